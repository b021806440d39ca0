"""Components of a pipeline directory: a folder each, and the class that reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Component:
    """A folder of a pipeline directory, and the class that reads it.

    `weights` is the name of its weight files without suffix, None where there are none. An `optional` component may be
    missing. `overrides` are fields of its configuration that training and sampling set otherwise.
    """

    folder: str
    role: Literal["denoiser", "text_encoder", "tokenizer", "vae", "scheduler"]
    library: Literal["diffusers", "transformers"]
    kind: str
    weights: str | None = None
    optional: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def load_class(self) -> Any:
        """The class, imported now."""
        import diffusers
        import transformers

        return getattr(diffusers if self.library == "diffusers" else transformers, self.kind)


def denoiser_part(folder: str, kind: str) -> Component:
    """A UNet or transformer of diffusers."""
    return Component(folder=folder, role="denoiser", library="diffusers", kind=kind, weights="diffusion_pytorch_model")


def text_encoder_part(folder: str, kind: str, *, optional: bool = False) -> Component:
    """A text encoder of transformers."""
    return Component(
        folder=folder, role="text_encoder", library="transformers", kind=kind, weights="model", optional=optional
    )


def t5_part(folder: str, *, optional: bool = False) -> Component:
    """T5's encoder without dropout: its masks would come from no seed of ours, and none of the others has any."""
    return Component(
        folder=folder,
        role="text_encoder",
        library="transformers",
        kind="T5EncoderModel",
        weights="model",
        optional=optional,
        overrides={"dropout_rate": 0.0},
    )


def tokenizer_part(folder: str, kind: str, *, optional: bool = False) -> Component:
    """The tokenizer of the text encoder whose folder has the same ending."""
    return Component(folder=folder, role="tokenizer", library="transformers", kind=kind, optional=optional)


VAE = Component(folder="vae", role="vae", library="diffusers", kind="AutoencoderKL", weights="diffusion_pytorch_model")


def scheduler_part(kind: str) -> Component:
    """The scheduler; `kind` is the class that has the defaults of the fields that are read, not the sampler."""
    return Component(folder="scheduler", role="scheduler", library="diffusers", kind=kind)
