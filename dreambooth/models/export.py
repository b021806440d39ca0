"""Export fine-tuned weights as a diffusers directory, and verify it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreambooth.models.base_model import pipeline_files, weight_files
from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.families import family_of
from dreambooth.models.probe import TOLERANCES, Trained, largest_difference

COMPONENTS = {"denoiser": "unet", "text_encoder": "text_encoder"}
"""Folders of the parts of `DreamBoothModel` in a pipeline directory."""

_WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}


def export_pipeline(
    base: Path,
    state: Mapping[str, Tensor],
    target: Path,
    *,
    dtype: torch.dtype = torch.float32,
    resolution: int | None = None,
) -> None:
    """Write a diffusers directory: the base's files with the trained components' weights, as `dtype`.

    `resolution` in pixels is that of training and the default of sampling; None keeps the base's. `state` is an
    engine's state_dict. Raises ValueError if its names aren't exactly those of the base's weights: a trained component
    is trained in all its layers.
    """
    trained = _by_component(base, state)
    for source in pipeline_files(base):
        name = source.relative_to(base)
        if name.parts[0] in trained and (source.suffix == ".safetensors" or name.name.endswith(".index.json")):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / name)
    _leave_out_what_is_missing(target)
    if resolution is not None:
        _set_resolution(target, resolution)
    for component, tensors in trained.items():
        on_disk = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        (target / component).mkdir(parents=True, exist_ok=True)
        save_file(on_disk, target / component / _WEIGHTS[component], {"format": "pt"})


def verify_export(directory: Path, base: Path, state: Mapping[str, Tensor], *, dtype: torch.dtype) -> None:
    """Compare a published directory with the trained state, by tensors and by text-encoder outputs.

    Hidden states of a few prompts by its text encoder have to be those of the trained one (`models.probe`), or
    of the base's where that stayed frozen, within the rounding of `dtype`. Raises ValueError naming the
    first tensor that is missing or differs, or the difference.
    """
    for component, tensors in _by_component(base, state).items():
        stored = load_file(directory / component / _WEIGHTS[component])
        for name, tensor in tensors.items():
            if name not in stored:
                raise ValueError(f"{directory / component} lacks {name}, which was trained")
            if not torch.equal(stored[name], tensor.to(dtype)):
                raise ValueError(f"{name} in {directory / component} is not what was trained")
    _verify_text_encoder(directory, base, state, dtype)


def _verify_text_encoder(directory: Path, base: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    family, probe = family_of(base), state.probe if isinstance(state, Trained) else None
    input_ids = family.tokenize(base, ["a photo of a dog"]) if probe is None else probe.input_ids

    def computed(folder: Path, weights: Mapping[str, Tensor]) -> Tensor:
        text_encoder = family.load_text_encoder(folder).eval()
        if weights:
            text_encoder.load_state_dict(weights)
        with torch.no_grad():
            return family.encode_text(text_encoder, input_ids)

    by_weights = computed(base, _of_owner("text_encoder", state))
    expected = by_weights if probe is None else probe.hidden_states
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


def put_weights(pipeline: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load an engine's state_dict into a pipeline's components. Returns the previous weights, to restore them."""
    before: dict[str, Tensor] = {}
    for owner, component in COMPONENTS.items():
        trained = _of_owner(owner, state)
        if trained:
            module = getattr(pipeline, component)
            before |= {f"{owner}.{name}": weight.detach().clone() for name, weight in module.named_parameters()}
            module.load_state_dict(trained)
    return before


def _of_owner(owner: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.partition(".")[2]: tensor for name, tensor in state.items() if name.startswith(f"{owner}.")}


def _by_component(base: Path, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split a state_dict by component, with the names of the base's files."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        owner, _, rest = name.partition(".")
        parts.setdefault(COMPONENTS[owner], {})[rest] = tensor
    return {component: _named_as_in(base / component, tensors) for component, tensors in parts.items()}


def _named_as_in(directory: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Restore the prefix `text_model.` of Stable Diffusion's files, which transformers 5 dropped."""
    expected: set[str] = set()
    for path in weight_files(directory.parent, directory.name):
        with safe_open(path, framework="pt") as stored:
            expected |= set(stored.keys())
    # A buffer in old files and a parameter nowhere.
    expected = {name for name in expected if not name.endswith("position_ids")}
    named = {f"text_model.{name}" if f"text_model.{name}" in expected else name: t for name, t in tensors.items()}
    differing = sorted(expected ^ set(named))
    if differing:
        raise ValueError(
            f"what was trained and the weights in {directory} differ in {len(differing)} names, first {differing[0]}"
        )
    return named


def _set_resolution(directory: Path, resolution: int) -> None:
    """Write a resolution to the UNet's configuration, where diffusers pipelines look for their default size."""
    path = directory / "unet" / "config.json"
    size = resolution // BaseSettings(directory).downscaling
    # A size below 64 that an early version of diffusers has written would be taken for a mistake.
    settings = json.loads(path.read_text()) | {"sample_size": size, "_diffusers_version": diffusers.__version__}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _leave_out_what_is_missing(directory: Path) -> None:
    """Remove components that aren't exported (a safety checker) from model_index.json, or diffusers looks for them."""
    path = directory / "model_index.json"
    index = json.loads(path.read_text())
    for name, value in index.items():
        if isinstance(value, list) and not (directory / name).is_dir():
            index[name] = [None, None]
    path.write_text(json.dumps(index | {"requires_safety_checker": False}, indent=2) + "\n")
