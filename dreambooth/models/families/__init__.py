"""Families of base models behind one protocol, one file each; no other module names a family.

A family is chosen by the class named in a pipeline's model_index.json. To support another one, add a file beside this
with a subclass of `Family` and list it in `FAMILIES`.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.errors import InputError
from dreambooth.models.component import Component
from dreambooth.models.families.deepfloyd import DeepFloydI, DeepFloydII
from dreambooth.models.families.defaults import Defaults
from dreambooth.models.families.family import Family, Tensors
from dreambooth.models.families.flux import Flux
from dreambooth.models.families.pixart import PixArtSigma
from dreambooth.models.families.sd3 import StableDiffusion3
from dreambooth.models.families.sdxl import StableDiffusionXL
from dreambooth.models.families.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "FAMILIES",
    "Component",
    "Defaults",
    "Family",
    "Tensors",
    "family_named",
    "family_of",
    "family_of_pipeline",
    "load_tokenizer",
]

FAMILIES: tuple[Family, ...] = (
    StableDiffusion(),
    StableDiffusionXL(),
    StableDiffusion3(),
    Flux(),
    PixArtSigma(),
    DeepFloydI(),
    DeepFloydII(),
)


def family_of(directory: Path, *, whole: bool = True) -> Family:
    """The family of a diffusers directory; with `whole` its component folders have to be there.

    Raises InputError for no pipeline, or an unsupported one.
    """
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
    family = family_named(name)
    if family is None:
        supported = ", ".join(family.pipeline_class for family in FAMILIES if not family.scales_up)
        raise InputError(f"{directory} holds a {name}, which is not supported; supported: {supported}")
    folders = [part.folder for part in family.components if not part.optional]
    missing = [folder for folder in folders if not (directory / folder).is_dir()]
    if whole and missing:
        raise InputError(f"the {name} in {directory} lacks {', '.join(missing)}; is the copy complete?")
    return family


def family_of_pipeline(pipeline: Any) -> Family:
    """The family of a loaded diffusers pipeline. Raises ValueError for an unsupported one."""
    family = family_named(type(pipeline).__name__)
    if family is None:
        raise ValueError(f"expected a pipeline of a supported family, got {type(pipeline).__name__}")
    return family


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a base model's first text encoder, from which identifiers are chosen.

    Raises InputError for invalid files.
    """
    return family_of(directory).tokenizer(directory)


def family_named(pipeline_class: str) -> Family | None:
    """The family of a pipeline's class, None for an unsupported one."""
    return next((family for family in FAMILIES if family.pipeline_class == pipeline_class), None)
