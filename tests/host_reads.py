"""What a step would wait for if a device did it."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2")
COPIES = ("_to_copy", "copy_")


class HostReads(TorchDispatchMode):
    """Operations that wait for a value or a size from the device, or copy between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        devices = {one.device for one in tree_leaves((args, kwargs, result)) if isinstance(one, torch.Tensor)}
        if name in READS or (name in COPIES and len(devices) > 1):
            self.seen.append(name)
        return result
