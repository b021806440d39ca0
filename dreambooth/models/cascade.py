"""A cascade: a base model, and a second stage that scales up its pictures by the same text.

Both are sampled with the first one's text encoder, so the second has to have learnt from an equal one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth.config.explain import as_given
from dreambooth.errors import InputError
from dreambooth.models.base_model import BaseModel
from dreambooth.models.component import Component
from dreambooth.models.config_fields import read_json
from dreambooth.models.families import load_tokenizer
from dreambooth.models.weight_files import weight_files

if TYPE_CHECKING:
    from torch import Tensor

SUPER_RESOLUTION = "super_resolution"
"""Name of a cascade's second stage: its folder in a published model, beside the first one's components."""

_ROUNDING = 1e-2
"""Relative difference of weights that are kept in another precision."""


def check_cascade(first: BaseModel, second: BaseModel, *, sides: tuple[int, int]) -> None:
    """Raise InputError unless the second stage fits the first, whose pictures have these sides in pixels."""
    small, large = sides
    factor = second.family.scales_up
    if large != factor * small:
        raise InputError(
            f"super_resolution.resolution is {large} and images.resolution {small}, but {second.family.name} makes "
            f"pictures {factor} times larger; expected {factor * small}"
        )
    if (difference := _difference(first, second)) is not None:
        raise InputError(
            f"base_model {first.address!r} and super_resolution.base_model {second.address!r} don't read prompts "
            f"alike: {difference}. Both stages are sampled with the first one's text encoder, so take a first stage "
            f"that was made together with {second.family.name}"
        )


def _difference(first: BaseModel, second: BaseModel) -> str | None:
    """The first difference between their text encoders and vocabularies, or None."""
    one, other = (base.family.text_encoders(base.directory) for base in (first, second))
    if [part.kind for part in one] != [part.kind for part in other]:
        shown = [", ".join(f"{part.folder} {part.kind}" for part in parts) or "none" for parts in (one, other)]
        return f"their text encoders are {shown[0]} and {shown[1]}"
    for part in one:
        configs = [read_json(base.directory / part.folder / "config.json") for base in (first, second)]
        for name in part.sizes:
            if (found := [config.get(name) for config in configs])[0] != found[1]:
                return f"{name} in {part.folder}/config.json is {as_given(found[0])} and {as_given(found[1])}"
    if load_tokenizer(first.directory).get_vocab() != load_tokenizer(second.directory).get_vocab():
        return "their vocabularies differ"
    if first.has_weights and second.has_weights:
        for part in one:
            if (tensor := _first_differing(first.directory, second.directory, part)) is not None:
                return f"{tensor} in {part.folder} has other weights"
    return None


def _first_differing(first: Path, second: Path, part: Component) -> str | None:
    """Name of the first tensor whose beginning differs by more than the rounding to another precision."""
    import torch

    others = dict(_beginnings(second, part))
    for name, one in _beginnings(first, part):
        other = others.get(name)
        if other is None:
            continue  # a name for tied weights that one of them leaves out
        if one.dtype == other.dtype:
            same = torch.equal(one, other)
        else:
            same = torch.allclose(one.float(), other.float(), rtol=_ROUNDING, atol=_ROUNDING / 100)
        if not same:
            return name
    return None


def _beginnings(directory: Path, part: Component) -> "Iterator[tuple[str, Tensor]]":
    """The first row of every tensor of a component, by name: a few megabytes of gigabytes."""
    from safetensors import safe_open

    for path in weight_files(directory, part):
        with safe_open(path, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                yield name, tensors.get_slice(name)[:1]
