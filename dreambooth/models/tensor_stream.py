"""Write a safetensors file tensor by tensor: its header says all shapes first, so one tensor is in memory at a time.

The format: 8 bytes with the header's length, the header as JSON, then the tensors' bytes in the header's order
(https://github.com/huggingface/safetensors#format).
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreambooth.errors import InputError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_NAMES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
_NAMES |= {torch.bool: "BOOL"}

Progress = Callable[[int, int], None]
"""Called with bytes written, and bytes in all."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A tensor to be written; `make` computes it, in any dtype."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def dtype_named(name: str) -> torch.dtype:
    """The dtype by its name in a safetensors header. Raises ValueError for one that is no float's."""
    if name not in _DTYPES:
        raise ValueError(f"expected a tensor of floats ({', '.join(_DTYPES)}), got {name}")
    return _DTYPES[name]


def write_tensors(
    target: Path,
    planned: Sequence[Planned],
    metadata: Mapping[str, str],
    *,
    on_progress: Progress = lambda done, total: None,
) -> str:
    """Write a file, and return its sha256. Raises ValueError where a tensor's shape isn't the planned one."""
    header, end = header_of(planned, metadata), sum(tensor.size for tensor in planned)
    total, done = hashlib.sha256(header), 0
    with target.open("wb") as file:
        file.write(header)
        for tensor in planned:
            content = content_of(tensor)
            total.update(content)
            file.write(content)
            done += tensor.size
            on_progress(done, end)
    return total.hexdigest()


def header_of(planned: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    """The start of a file, up to the first tensor."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in planned:
        begin, end = end, end + tensor.size
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8 bytes
    return len(text).to_bytes(8, "little") + text


def content_of(planned: Planned) -> memoryview:
    """A tensor's bytes, not copied where it lies in main memory as planned. Raises ValueError for another shape."""
    tensor = planned.make()
    if tuple(tensor.shape) != planned.shape:
        raise ValueError(f"{planned.name} has shape {tuple(tensor.shape)}, expected {planned.shape}")
    flat = tensor.detach().to("cpu", planned.dtype).contiguous().reshape(-1)
    if planned.dtype is torch.float16 and bool(flat.isinf().any()) and not bool(tensor.isinf().any()):
        raise InputError(f"{planned.name} has numbers beyond the range of float16; choose bfloat16 or float32")
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # Buffer is Python 3.12's


def planned_as(opened: Mapping[str, Any], dtype: torch.dtype) -> list[Planned]:
    """Tensors of opened files (`open_tensors`) by their own names, in another dtype."""
    return [
        Planned(
            name=name,
            dtype=dtype,
            shape=tuple(stored.get_slice(name).get_shape()),
            make=partial(stored.get_tensor, name),
        )
        for name, stored in sorted(opened.items())
    ]
