"""fp32 masters beside bf16 weights, from the values that the base model has.

DeepSpeed rounds weights to bf16 before it copies its masters from them. So the values from before are put there once it
has made them. Weights that aren't trained have no masters, and stay as they were.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.models.stored_weights import SliceReader
from dreambooth.training.model import DreamBoothModel
from pipelines.worker.zero3 import Source, copy_part, partition


class ExactWeights:
    """The values of a model's parameters, until they are put into the masters."""

    def __init__(self, sources: Mapping[nn.Parameter, Source], *, stage: int) -> None:
        self._sources, self._stage = dict(sources), stage

    @classmethod
    def before_rounding(cls, model: DreamBoothModel, config: Mapping[str, Any], *, stage: int) -> "ExactWeights":
        """Masters of a model that DeepSpeed is about to round, which are kept; of ZeRO-3 it is partitioned here.

        Call it before the optimizer is made. `config` is DeepSpeed's.
        """
        if stage == 3:
            return cls(partition(model, config, dtype=torch.bfloat16), stage=stage)
        return cls({parameter: parameter.data for parameter in model.parameters()}, stage=stage)

    @torch.no_grad()
    def put_back(self) -> None:
        """Put them into the masters of this rank, and free each."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        reader = SliceReader()
        for parameter in list(self._sources):
            source = self._sources.pop(parameter)
            if self._stage == 3:
                if parameter.requires_grad:
                    part = torch.empty(parameter.ds_tensor.numel())  # type: ignore[attr-defined]
                    copy_part(source, parameter, part, reader)
                    safe_set_local_fp32_param(parameter, part)
                continue
            assert isinstance(source, Tensor)
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, source)
            else:
                parameter.data = source.to(parameter.device)


def masters_of(optimizer: Any) -> list[Tensor]:
    """The fp32 tensors that one of DeepSpeed's optimizers holds of this rank's partitions."""
    names = "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"
    return next(list(getattr(optimizer, name)) for name in names if hasattr(optimizer, name))
