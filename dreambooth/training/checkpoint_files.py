"""The files of a checkpoint, each with what it holds and how that is written: as a stream, whole in no memory."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dreambooth.models.tensor_stream import Planned, content_of, header_of


class Sink(Protocol):
    """What a file is written to."""

    def write(self, content: bytes | memoryview, /) -> int:
        """Append bytes; returns their number."""

    def flush(self) -> object:
        """Pass on what is buffered."""


def write_pickle(content: Any, file: Sink) -> None:
    """Write tensors and plain values for `torch.load`, storage by storage."""
    torch.save(content, file)  # type: ignore[arg-type]


def write_safetensors(tensors: Mapping[str, Tensor], file: Sink, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name as safetensors, one at a time."""
    planned = [
        Planned(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), make=lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in tensors.items()
    ]
    file.write(header_of(planned, metadata or {}))
    for one in planned:
        file.write(content_of(one))


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """A file below a checkpoint's folder.

    `content` is nested dicts, lists and tuples of tensors and plain values, and `write` takes it and a file. Tensors
    are the engine's own, so they are the checkpoint's until the engine changes them.
    """

    name: str
    content: Any
    write: Callable[[Any, Sink], None] = write_pickle


def save_files(files: Iterable[CheckpointFile], directory: Path) -> None:
    """Write files below a directory."""
    for one in files:
        path = directory / one.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            one.write(one.content, file)
