"""Differences between families of base models, behind one protocol; `dreambooth.training.model` has the rest.

A family is chosen by the class named in a pipeline's model_index.json. To support another one, add a file beside this
with a class that fulfils `Family` and list it in `FAMILIES`.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dreambooth.errors import InputError
from dreambooth.models.families.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Family(Protocol):
    """One family of latent text-to-image diffusion models."""

    pipeline_class: str
    components: tuple[str, ...]

    def load_denoiser(self, directory: Path, dtype: "torch.dtype | None" = None) -> "nn.Module":
        """The denoiser, in fp32 unless another dtype is given."""

    def load_text_encoder(self, directory: Path, dtype: "torch.dtype | None" = None) -> "nn.Module":
        """The text encoder, in fp32 unless another dtype is given."""

    def empty_components(self, directory: Path, *, device: str = "meta") -> "tuple[nn.Module, nn.Module]":
        """(denoiser, text encoder) with uninitialized weights; on the meta device they have shapes alone."""

    def tokenize(self, directory: Path, prompts: list[str]) -> "Tensor":
        """Token ids (N, L) of the prompts, padded and truncated as the base model was trained."""

    def encode_text(self, text_encoder: "nn.Module", input_ids: "Tensor") -> "Tensor":
        """encoder_hidden_states (N, L, D) of token ids (N, L)."""

    def denoise(
        self, denoiser: "nn.Module", noisy_latents: "Tensor", timesteps: "Tensor", encoder_hidden_states: "Tensor"
    ) -> "Tensor":
        """model_pred (N, C, H, W)."""


FAMILIES: tuple[Family, ...] = (StableDiffusion(),)


def family_of(directory: Path) -> Family:
    """The family of a diffusers directory. Raises InputError for no pipeline, or an unsupported one."""
    index = directory / "model_index.json"
    if not index.is_file():
        raise InputError(
            f"expected a diffusers pipeline in {directory}, but it has no model_index.json; give the folder that "
            f"save_pretrained wrote, or a hub id"
        )
    try:
        name = json.loads(index.read_text())["_class_name"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise InputError(f"{index} does not name a pipeline class; it should hold '_class_name'") from None
    for family in FAMILIES:
        if family.pipeline_class == name:
            missing = [part for part in family.components if not (directory / part).is_dir()]
            if missing:
                raise InputError(f"the {name} in {directory} lacks {', '.join(missing)}; is the copy complete?")
            return family
    supported = ", ".join(family.pipeline_class for family in FAMILIES)
    raise InputError(f"{directory} holds a {name}, which is not supported; supported: {supported}")
