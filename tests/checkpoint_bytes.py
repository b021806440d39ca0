"""The size of a checkpoint's tensors, to hold a plan's prediction to."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def tensor_bytes(folder: Path, *, weights_only: bool = True) -> int:
    """Bytes of all tensors in a checkpoint; what is beside them is little, but for a model as small as a test's."""

    def of(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return sum(of(one) for one in values)

    loaded = [torch.load(path, weights_only=weights_only) for path in folder.rglob("*.pt")]
    return sum(of(one) for one in [*loaded, *(load_file(path) for path in folder.rglob("*.safetensors"))])
