"""No text as zeros, where a pipeline has them for it instead of the states of ""."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

HAS_TEXT = "has_text"
"""Name of a text's factors (N,): 0 for no text, else 1."""


def zero_without_text(joined: "dict[str, Tensor]", text: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """The denoiser's text (N, ...), zero where `text` says that there is none."""
    if HAS_TEXT not in text:
        return joined
    has_text = text[HAS_TEXT]
    return {name: part * has_text.view(-1, *[1] * (part.ndim - 1)).to(part.dtype) for name, part in joined.items()}
