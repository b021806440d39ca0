"""A diffusers directory as one safetensors file, in the layout that ComfyUI and AUTOMATIC1111's web UI read, and back.

Only names and shapes differ: a tensor of the file is one of the directory's, or several joined, and bit for bit the
same in the directory's dtype. Where each lies, its family says (`Family.single_file_names`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreambooth.models.families import Component, Family, family_of
from dreambooth.models.placed import Form, formed
from dreambooth.models.tensor_stream import Planned, Progress, dtype_named, write_tensors
from dreambooth.models.weight_files import open_tensors


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A tensor of the directory, and what is done to it."""

    stored: Any  # the opened file, whose header is read once
    name: str
    form: Form
    dtype: torch.dtype
    shape: tuple[int, ...]  # in the file's form

    def read(self) -> Tensor:
        return formed(self.stored.get_tensor(self.name), self.form)


def write_single_file(
    directory: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str],
    on_progress: Progress = lambda done, total: None,
) -> str:
    """Write a diffusers directory as one file, and return its sha256; `dtype` None keeps that of each tensor.

    One tensor is in memory at a time. Raises InputError for a family without such a layout.
    """
    planned = plan_single_file(directory, dtype=dtype)
    return write_tensors(target, planned, {"format": "pt", **metadata}, on_progress=on_progress)


def plan_single_file(directory: Path, *, dtype: torch.dtype | None = None) -> list[Planned]:
    """The tensors of the file, by name. Raises InputError for a family without such a layout."""
    joined: dict[str, dict[int, _Part]] = {}
    family = family_of(directory)
    for component in family.parts(directory):
        if component.weights is not None:
            _add(joined, directory, family, component)
    return [_planned(name, [parts[place] for place in sorted(parts)], dtype) for name, parts in sorted(joined.items())]


def left_out(family: Family, directory: Path) -> Iterator[tuple[str, float]]:
    """Projections without a place in the file, for which readers take the identity, and how far they are from it.

    As a share of their norm; those that are the identity aren't named.
    """
    for component in family.text_encoders(directory):
        stored = open_tensors(directory, component)
        placed = family.single_file_names(directory, component.folder, stored)
        for name in stored.keys() - placed.keys():
            if name.endswith("projection.weight"):
                weight = stored[name].get_tensor(name).float()
                share = float((weight - torch.eye(*weight.shape)).norm() / weight.norm())
                if share > 0:
                    yield f"{component.folder}.{name}", share


def _add(joined: dict[str, dict[int, _Part]], directory: Path, family: Family, component: Component) -> None:
    """Add a component's tensors to those of a file, by name and place."""
    files = open_tensors(directory, component)
    for name, placed in family.single_file_names(directory, component.folder, files).items():
        tensor = files[name].get_slice(name)
        shape = torch.empty(tensor.get_shape(), device="meta")
        part = _Part(
            stored=files[name],
            name=name,
            form=placed.form,
            dtype=dtype_named(tensor.get_dtype()),
            shape=tuple(formed(shape, placed.form).shape),
        )
        for target in (placed.name, *placed.copies):
            places = joined.setdefault(target, {})
            if placed.place in places:
                raise ValueError(f"{name} and {places[placed.place].name} would both be {target} in the file")
            places[placed.place] = part


def _planned(name: str, parts: list[_Part], dtype: torch.dtype | None) -> Planned:
    own = parts[0].dtype
    for part in parts:
        own = torch.promote_types(own, part.dtype)
    rows = sum(part.shape[0] for part in parts)
    return Planned(
        name=name,
        dtype=dtype or own,
        shape=(rows, *parts[0].shape[1:]) if len(parts) > 1 else parts[0].shape,
        make=lambda: torch.cat([part.read() for part in parts]) if len(parts) > 1 else parts[0].read(),
    )
