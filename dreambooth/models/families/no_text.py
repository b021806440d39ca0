"""No text as zeros, where a pipeline has them for it instead of the states of ""."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TOLD = "told"
"""Name of a text's factors (N,): 0 for no text, else 1."""


def without_untold(joined: "dict[str, Tensor]", text: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """The denoiser's text (N, ...), zero where `text` says that there is none."""
    if TOLD not in text:
        return joined
    told = text[TOLD]
    return {name: part * told.view(-1, *[1] * (part.ndim - 1)).to(part.dtype) for name, part in joined.items()}
