"""ZeRO-3 of a model that no rank holds: each reads its part of every parameter from the base model's files.

And blocks of transformers are gathered as wholes. DeepSpeed flattens a parameter and gives rank r of N the r-th of N
equal parts, the last ones padded.
"""

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.models.stored_weights import SliceReader, StoredTensor
from dreambooth.training.model import DreamBoothModel

Source = StoredTensor | Tensor
"""Where the values of a parameter are: in a file, or in memory."""


def partition(
    model: DreamBoothModel, config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32
) -> dict[nn.Parameter, Source]:
    """Make ZeRO-3's parameters of those that are stored; `config` is DeepSpeed's. Needs a process group.

    With another `dtype` than fp32, which trained ones get, also of those in memory: DeepSpeed rounds none of a model
    partitioned before. The sources of all values are returned.

    Call it before the optimizer is made: they are other objects than before. Beside its parts, a rank has room for one
    parameter at a time, of which it touches its part alone.
    """
    import deepspeed

    # As DeepSpeed itself does for a loaded model, but without a parameter to broadcast.
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=dict(config), dtype=dtype)
    reader, placed, sources = SliceReader(), dict[int, nn.Parameter](), dict[nn.Parameter, Source]()
    for prefix, module in model.named_modules():
        for name, tensor in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(tensor) not in placed:  # T5's table has two names
                if not tensor.is_meta and dtype == torch.float32:
                    continue
                source = model.stored[f"{prefix}.{name}"] if tensor.is_meta else tensor.detach()
                empty = torch.empty(
                    tensor.shape, device=init.local_device, dtype=dtype if tensor.requires_grad else torch.float32
                )
                one = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                placed[id(tensor)] = one
                sources[one] = source
                init._convert_to_deepspeed_param(one)
                one.partition()  # type: ignore[attr-defined]
                copy_part(source, one, one.ds_tensor, reader)  # type: ignore[attr-defined]
            module.register_parameter(name, placed[id(tensor)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(init.local_device)  # DeepSpeed moves none of a model partitioned before
    return sources


@torch.no_grad()
def copy_part(source: Source, parameter: Any, part: Tensor, reader: SliceReader) -> None:
    """Copy this rank's part of a parameter's values to `part`, which ends in zeros if it is padded."""
    start = part.numel() * parameter.ds_zero_partition_rank
    end = max(start, min(start + part.numel(), parameter.ds_numel))
    values = source.reshape(-1)[start:end] if isinstance(source, Tensor) else reader.read(source, start, end)
    part.narrow(0, 0, end - start).copy_(values)
    part.narrow(0, end - start, part.numel() - (end - start)).zero_()


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
