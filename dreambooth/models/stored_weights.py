"""Weights that stay in their files: a component has shapes alone, and slices of its parameters are read when placed.

For a model that one process can't hold, of which each rank of ZeRO-3 keeps a part of every parameter.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dreambooth.models.component import Component
from dreambooth.models.weight_files import open_weights, weight_files

_PREFIX = "text_model."
"""Prefix of CLIP's text encoders in names of files or of the class, depending on transformers' version."""
_READ_BEFORE_REOPENING = 32 * 2**20
"""Bytes read of a file before it is opened anew: pages of an opened one count as the process's memory."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a safetensors file."""

    path: Path
    name: str
    shape: tuple[int, ...]


class SliceReader:
    """Reads parts of stored tensors, with one file opened at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._opened: Any = None
        self._read = 0

    def read(self, stored: StoredTensor, start: int, end: int) -> Tensor:
        """Values [start, end) of the flattened tensor, on the CPU, in the file's dtype; a view of the file.

        Copy it before the next call: then no more than some 32 MiB of the files are held in memory.
        """
        piece = self._file(stored.path).get_slice(stored.name)
        if not stored.shape:
            part: Tensor = piece[...].reshape(-1)[start:end]
        else:
            row = math.prod(stored.shape[1:])
            first, last = start // row, -(-end // row)
            part = piece[first:last].reshape(-1)[start - first * row : end - first * row]
        self._read += part.numel() * part.element_size()
        return part

    def row(self, stored: StoredTensor, index: int) -> Tensor:
        """One row of a stored matrix, a copy."""
        width = stored.shape[1]
        return self.read(stored, index * width, (index + 1) * width).clone()

    def _file(self, path: Path) -> Any:
        if path != self._path or self._read >= _READ_BEFORE_REOPENING:
            self._opened = None  # closed first
            self._opened, self._path, self._read = open_weights(path), path, 0
        return self._opened


class _ParametersOnMeta(TorchFunctionMode):
    """Within it, modules of torch, diffusers and transformers make parameters without memory, and buffers with values.

    Parameters that are to be drawn or loaded begin as `torch.empty`; buffers are computed.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Put `torch.empty` on the meta device where none is named."""
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """A context within which this thread builds modules whose large parameters take no memory."""
    with _ParametersOnMeta():
        yield


def stored_weights(directory: Path, component: Component, module: nn.Module) -> dict[str, StoredTensor] | None:
    """Tensors of a component's files by the names of its module's parameters, which then all are on the meta device.

    The module was built within `parameters_on_meta`; buffers that the files have are read. None if the files name or
    shape a parameter otherwise, which only the library's own loading makes good.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(directory, component):
        with open_weights(path) as opened:
            for name in opened.keys():  # noqa: SIM118 - no dict
                shape = tuple(opened.get_slice(name).get_shape())
                found[name] = StoredTensor(path=path, name=name, shape=shape)
    stored: dict[str, StoredTensor] = {}
    by_parameter: dict[int, StoredTensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        one = _named(found, name)
        if one is not None and one.shape == tuple(parameter.shape):
            by_parameter.setdefault(id(parameter), one)
    for name, parameter in module.named_parameters():
        if id(parameter) not in by_parameter:
            return None
        stored[name] = by_parameter[id(parameter)]
    if not _read_buffers(module, found):
        return None
    _put_on_meta(module)
    return stored


def _read_buffers(module: nn.Module, found: Mapping[str, StoredTensor]) -> bool:
    """Read the buffers that the files have. False if one has no values."""
    reader, state = SliceReader(), module.state_dict()
    for name, buffer in module.named_buffers():
        if name in state and (one := _named(found, name)) is not None:
            if one.shape != tuple(buffer.shape):
                return False
            buffer.copy_(reader.read(one, 0, buffer.numel()).view(buffer.shape))
        if buffer.is_meta:
            return False
    return True


def _put_on_meta(module: nn.Module) -> None:
    """Take the memory of parameters that have some, such as scales that begin as ones."""
    moved: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if not parameter.is_meta:
                meta = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                owner.register_parameter(name, moved.setdefault(id(parameter), meta))


def _named(found: Mapping[str, StoredTensor], name: str) -> StoredTensor | None:
    for candidate in (name, f"{_PREFIX}{name}", name.removeprefix(_PREFIX)):
        if candidate in found:
            return found[candidate]
    return None
