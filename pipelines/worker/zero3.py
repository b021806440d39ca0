"""ZeRO-3 of a model that no rank holds: each reads its part of every parameter from the base model's files.

DeepSpeed flattens a parameter and gives rank r of N the r-th of N equal parts, the last ones padded.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dreambooth.models.stored_weights import SliceReader, StoredTensor
from dreambooth.training.model import DreamBoothModel


def partition_stored(model: DreamBoothModel, config: Mapping[str, Any]) -> None:
    """Make ZeRO-3's parameters of those that are stored, in fp32; `config` is DeepSpeed's. Needs a process group.

    Call it before the optimizer is made: they are other objects than before. Beside its parts, a rank has room for one
    parameter at a time, of which it touches its part alone.
    """
    import deepspeed

    # As DeepSpeed itself does for a loaded model, but without a parameter to broadcast.
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=dict(config), dtype=torch.float32)
    reader, placed = SliceReader(), dict[int, nn.Parameter]()
    for prefix, module in model.named_modules():
        for name, tensor in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not tensor.is_meta:
                continue
            if id(tensor) not in placed:  # T5's table has two names
                stored = model.stored[f"{prefix}.{name}"]
                placed[id(tensor)] = _partition(init, stored, reader, requires_grad=tensor.requires_grad)
            module.register_parameter(name, placed[id(tensor)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(init.local_device)  # DeepSpeed moves none of a model partitioned before


def _partition(init: Any, stored: StoredTensor, reader: SliceReader, *, requires_grad: bool) -> nn.Parameter:
    empty = torch.empty(stored.shape, device=init.local_device)
    parameter = nn.Parameter(empty, requires_grad=requires_grad)
    init._convert_to_deepspeed_param(parameter)
    zero: Any = parameter  # with what DeepSpeed has added
    zero.partition()
    part = zero.ds_tensor
    start = part.numel() * zero.ds_zero_partition_rank
    end = max(start, min(start + part.numel(), zero.ds_numel))
    with torch.no_grad():
        part.narrow(0, 0, end - start).copy_(reader.read(stored, start, end))
        part.narrow(0, end - start, part.numel() - (end - start)).zero_()  # padding
    return parameter
