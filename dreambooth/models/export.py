"""Export fine-tuned weights as a diffusers directory, and verify it."""

import filecmp
import json
import shutil
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreambooth.amounts import counted
from dreambooth.models.base_model import pipeline_files
from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.cascade import SUPER_RESOLUTION
from dreambooth.models.families import Component, Family, Tensors, family_of, family_of_pipeline
from dreambooth.models.probe import TOLERANCES, Probe, Trained, largest_difference
from dreambooth.models.tied_weights import load_parameters
from dreambooth.models.weight_files import plain_name, weight_files

_COUNTED = "position_ids"
"""Ending of names in weight files that every version of a library counts anew."""


def export_pipeline(
    base: Path,
    state: Mapping[str, Tensor],
    target: Path,
    *,
    dtype: torch.dtype = torch.float32,
    resolution: int | None = None,
    noise_levels: int | None = None,
) -> None:
    """Write a diffusers directory: the base's files with the trained components' weights, as `dtype`.

    `resolution` in pixels is that of training and the default of sampling, `noise_levels` are those that a cascade's
    second stage was tuned on; None keeps the base's. `state` is an engine's state_dict. Raises ValueError if its names
    aren't exactly those of the base's weights: a trained component is trained in all its layers.
    """
    trained = _by_component(base, state)
    for source in pipeline_files(base):
        name = source.relative_to(base)
        if name.parts[0] in trained and (source.suffix == ".safetensors" or name.name.endswith(".index.json")):
            continue
        _copy_plain(source, target / name.parent)
    _leave_out_what_is_missing(target)
    if resolution is not None:
        _set_resolution(target, resolution)
    if noise_levels is not None:
        family_of(base).set_noise_levels(target, noise_levels)
    family_of(base).finish_export(target)
    for component, tensors in trained.items():
        on_disk = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        (target / component).mkdir(parents=True, exist_ok=True)
        save_file(on_disk, target / component / _file_of(base, component), {"format": "pt"})


def verify_export(directory: Path, base: Path, state: Mapping[str, Tensor], *, dtype: torch.dtype) -> None:
    """Compare a published directory with the trained state, by tensors and by text-encoder outputs.

    Hidden states of a few prompts by its text encoder have to be those of the trained one (`models.probe`), or
    of the base's where that stayed frozen, within the rounding of `dtype`. Raises ValueError naming the
    first tensor that is missing or differs, or the difference.
    """
    for component, tensors in _by_component(base, state).items():
        stored = load_file(directory / component / _file_of(base, component))
        for name, tensor in tensors.items():
            if name not in stored:
                raise ValueError(f"{directory / component} lacks {name}, which was trained")
            if not torch.equal(stored[name], tensor.to(dtype)):
                raise ValueError(f"{name} in {directory / component} is not what was trained")
    _verify_text_encoders(directory, base, state, dtype)


def _copy_plain(source: Path, folder: Path) -> None:
    """Copy a file of a base; one of a variant gets the plain name, under which every library looks for it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = plain_name(source.name)
    if name == source.name or not name.endswith(".json"):
        shutil.copyfile(source, folder / name)
        return
    index = json.loads(source.read_text())
    index["weight_map"] = {tensor: plain_name(file) for tensor, file in index["weight_map"].items()}
    (folder / name).write_text(json.dumps(index, indent=2) + "\n")


def _file_of(base: Path, component: str) -> str:
    return f"{family_of(base).component(component).weights}.safetensors"


def _verify_text_encoders(directory: Path, base: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    family, probe = family_of(base), state.probe if isinstance(state, Trained) else None
    if probe is None:
        probe = Probe(tokens=family.tokenize(base, ["a photo of a dog"]), encoded={})
    for part in family.text_encoders(base):
        weights = _of_owner(part.folder, state)
        if weights or not _same_files(directory, base, part):
            _verify_text_encoder(directory, base, weights, dtype, part, probe)


def _verify_text_encoder(
    directory: Path, base: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, part: Component, probe: Probe
) -> None:
    family = family_of(base)

    def computed(folder: Path, weights: Mapping[str, Tensor]) -> Tensors:
        text_encoder = family.load(folder, part.folder).eval()
        if weights:
            load_parameters(text_encoder, weights)
        with torch.no_grad():
            return family.encode_with(part.folder, text_encoder, probe.tokens)

    by_weights = computed(base, weights)
    expected = {name: probe.encoded.get(name, tensor) for name, tensor in by_weights.items()}
    for what, found, tolerance in (
        ("with the weights to be published", by_weights, TOLERANCES[torch.float32]),
        (f"in {directory}", computed(directory, {}), TOLERANCES[dtype]),
    ):
        difference = largest_difference(found, expected)
        if not difference <= tolerance:
            raise ValueError(
                f"the text encoder {what} computes something else than the trained one: hidden states differ by "
                f"{difference:.2g} of their norm, and no more than {tolerance:g} is rounding"
            )


def _same_files(directory: Path, base: Path, part: Component) -> bool:
    """Whether a frozen component was copied whole: then there is nothing to compute."""
    return all(
        (copy := directory / path.relative_to(base)).is_file() and filecmp.cmp(path, copy, shallow=False)
        for path in (*weight_files(base, part), base / part.folder / "config.json")
    )


def put_weights(pipeline: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load an engine's state_dict into a pipeline's components. Returns the previous weights, to restore them.

    Those named `super_resolution.…` are of its second stage, the attribute of that name.
    """
    before: dict[str, Tensor] = {}
    if of_second := _of_owner(SUPER_RESOLUTION, state):
        own = put_weights(getattr(pipeline, SUPER_RESOLUTION), of_second)
        before |= {f"{SUPER_RESOLUTION}.{name}": weight for name, weight in own.items()}
    for owner, component in _owners(family_of_pipeline(pipeline)).items():
        trained = _of_owner(owner, state)
        if trained:
            module = getattr(pipeline, component)
            before |= {f"{owner}.{name}": weight.detach().clone() for name, weight in module.named_parameters()}
            load_parameters(module, trained)
    return before


def _owners(family: Family) -> dict[str, str]:
    """Folders of the parts of `DreamBoothModel` in a pipeline directory."""
    return {"denoiser": family.denoiser.folder} | {part.folder: part.folder for part in family.role("text_encoder")}


def _of_owner(owner: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.partition(".")[2]: tensor for name, tensor in state.items() if name.startswith(f"{owner}.")}


def _by_component(base: Path, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split a state_dict by component, with the names of the base's files."""
    family = family_of(base)
    owners = _owners(family)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        owner, _, rest = name.partition(".")
        parts.setdefault(owners[owner], {})[rest] = tensor
    return {folder: _named_as_in(base, family.component(folder), tensors) for folder, tensors in parts.items()}


def _named_as_in(base: Path, component: Component, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of the base's files, some with a prefix that transformers drops, and buffers."""
    expected: dict[str, Path] = {}
    for path in weight_files(base, component):
        with safe_open(path, framework="pt") as stored:
            expected |= dict.fromkeys(stored.keys(), path)
    named = {_spelled_as_in(expected, name): tensor for name, tensor in tensors.items()}
    for name in [name for name in expected if name not in named and name.endswith(component.buffers)]:
        with safe_open(expected[name], framework="pt") as stored:
            named[name] = stored.get_tensor(name)
    differing = sorted(name for name in set(expected) ^ set(named) if not name.endswith((*component.buffers, _COUNTED)))
    if differing:
        raise ValueError(
            f"what was trained and the weights in {base / component.folder} differ in "
            f"{counted(len(differing), 'name')}, first {differing[0]}"
        )
    return named


def _spelled_as_in(names: Container[str], name: str) -> str:
    """A CLIP parameter's name with or without `text_model.`, as files have it."""
    others = (f"text_model.{name}", name.removeprefix("text_model."))
    return next((other for other in others if other in names), name)


def _set_resolution(directory: Path, resolution: int) -> None:
    """Write a resolution to the denoiser's configuration, where diffusers pipelines look for their default size."""
    settings = BaseSettings(directory)
    family = settings.family
    path = directory / family.denoiser.folder / "config.json"
    config = family.set_resolution(json.loads(path.read_text()), settings.x0_shape(resolution)[1])
    path.write_text(json.dumps(config, indent=2) + "\n")


def _leave_out_what_is_missing(directory: Path) -> None:
    """Remove components that aren't exported (a safety checker) from model_index.json, or diffusers looks for them."""
    path = directory / "model_index.json"
    index = json.loads(path.read_text())
    for name, value in index.items():
        if isinstance(value, list) and not (directory / name).is_dir():
            index[name] = [None, None]
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    path.write_text(json.dumps(index, indent=2) + "\n")
