"""Components of a pipeline directory: a folder each, and the class that reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Component:
    """A folder of a pipeline directory, and the class that reads it.

    `weights` is the name of its weight files without suffix, None where there are none. An `optional` component may be
    missing. `overrides` are fields of its configuration that training and sampling set otherwise. `buffers` are endings
    of names in its weight files that are no parameters of their own, such as tables of positions.

    Of a text encoder, `width` is the field of its configuration with the width of its embeddings, `sizes` are those
    that decide its shapes, and `table` is the ending of the name of its table of tokens.
    """

    folder: str
    role: Literal["denoiser", "text_encoder", "tokenizer", "vae", "scheduler"]
    library: Literal["diffusers", "transformers"]
    kind: str
    weights: str | None = None
    optional: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    width: str = "hidden_size"
    sizes: tuple[str, ...] = ()
    table: str = "token_embedding.weight"

    def load_class(self) -> Any:
        """The class, imported now."""
        import diffusers
        import transformers

        return getattr(diffusers if self.library == "diffusers" else transformers, self.kind)


def denoiser_part(folder: str, kind: str, *, buffers: tuple[str, ...] = ()) -> Component:
    """A UNet or transformer of diffusers."""
    return Component(
        folder=folder,
        role="denoiser",
        library="diffusers",
        kind=kind,
        weights="diffusion_pytorch_model",
        buffers=buffers,
    )


def text_encoder_part(folder: str, kind: str, *, optional: bool = False) -> Component:
    """A text encoder of transformers."""
    return Component(
        folder=folder, role="text_encoder", library="transformers", kind=kind, weights="model", optional=optional
    )


def tokenizer_part(folder: str, kind: str, *, optional: bool = False) -> Component:
    """The tokenizer of the text encoder whose folder has the same ending."""
    return Component(folder=folder, role="tokenizer", library="transformers", kind=kind, optional=optional)


VAE = Component(folder="vae", role="vae", library="diffusers", kind="AutoencoderKL", weights="diffusion_pytorch_model")


def scheduler_part(kind: str) -> Component:
    """The scheduler; `kind` is the class that has the defaults of the fields that are read, not the sampler."""
    return Component(folder="scheduler", role="scheduler", library="diffusers", kind=kind)
