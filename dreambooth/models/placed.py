"""Where a tensor of a diffusers directory lies in a single file, the layout that a model was first published in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["same", "transposed", "pointwise", "swapped"]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """The `place`-th of the tensors that are joined along their first axis to the tensor `name` of a single file.

    `copies` are other names that the file has it under. `form` is what is done to it before: nothing; `transposed`
    (M, N) to (N, M); `pointwise`, a linear layer (M, N) to a convolution (M, N, 1, 1); `swapped`, its halves exchanged,
    as scale and shift of some modulations are.
    """

    name: str
    place: int = 0
    form: Form = "same"
    copies: tuple[str, ...] = ()


Names = Mapping[str, Placed]
"""Places by a component's tensors' names in a diffusers directory; those left out have none in a single file."""


def formed(tensor: "Tensor", form: Form) -> "Tensor":
    """A tensor in the form of the single file."""
    if form == "transposed":
        return tensor.T
    if form == "pointwise":
        return tensor[..., None, None] if tensor.ndim == 2 else tensor
    return _swapped(tensor) if form == "swapped" else tensor


def unformed(tensor: "Tensor", form: Form) -> "Tensor":
    """The inverse of `formed`."""
    if form == "transposed":
        return tensor.T
    if form == "pointwise":
        return tensor.flatten(1) if tensor.ndim > 1 else tensor
    return _swapped(tensor) if form == "swapped" else tensor


def _swapped(tensor: "Tensor") -> "Tensor":
    import torch

    first, second = tensor.chunk(2)
    return torch.cat([second, first])
