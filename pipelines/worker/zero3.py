"""ZeRO-3 of a model that no rank holds: each reads its part of every parameter from the base model's files.

And blocks of transformers are gathered as wholes. DeepSpeed flattens a parameter and gives rank r of N the r-th of N
equal parts, the last ones padded.
"""

import inspect
from collections import Counter
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


def gather_by_block(model: DreamBoothModel) -> None:
    """Have ZeRO-3 gather each of the denoiser's repeated blocks by one collective, instead of layer by layer.

    Call it before DeepSpeed's engine is made. Not those of text encoders: with SDXL's two, whose states are taken from
    between their layers, gradients were left over after a step (DeepSpeed 0.19.8).
    """
    from deepspeed.utils import set_z3_leaf_modules

    if kinds := repeated_blocks(model.denoiser):
        for block in set_z3_leaf_modules(model.denoiser, kinds):
            take_inputs_by_place(block)


def repeated_blocks(denoiser: nn.Module) -> list[type[nn.Module]]:
    """Classes of the blocks that a denoiser consists of, by what diffusers says."""
    repeated: Any = getattr(denoiser, "_repeated_blocks", None)
    names = set(repeated or getattr(denoiser, "_no_split_modules", None) or ())
    counts = Counter(type(module) for module in denoiser.modules() if type(module).__name__ in names)
    return [kind for kind, count in counts.items() if repeated or count > 1]


def take_inputs_by_place(block: nn.Module) -> None:
    """Have a block's inputs passed by place, whoever calls it.

    DeepSpeed reduces such a block's gradients when those of its inputs are there. PyTorch looks for inputs by place
    alone: without any, that is before the backward pass of the block, and DeepSpeed takes zeros for the gradients.
    """
    signature = inspect.signature(block.forward)

    def by_place(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args, bound.kwargs

    block.register_forward_pre_hook(by_place, with_kwargs=True)
