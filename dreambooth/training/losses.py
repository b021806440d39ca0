"""The prior-preservation loss (Ruiz et al., arXiv 2208.12242, section 3.2) as pure functions of tensors.

The paper writes, with x the instance half and x_pr the class half:

    E[ w_t ||x̂(a_t x + s_t ε, c) - x||² + lambda w_t' ||x̂(a_t' x_pr + s_t' ε', c_pr) - x_pr||² ]

`prior_loss_weight` is its lambda. A denoiser that predicts noise or velocity instead of x has the same loss under
another weight w_t (see `models.process`).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Losses(NamedTuple):
    """Scalars: total = instance + prior_loss_weight * prior."""

    total: Tensor
    instance: Tensor
    prior: Tensor


def image_errors(
    model_pred: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Mean squared errors (N,) of images (N, C, H, W), in fp32, whatever the model ran in.

    `weight` (N,) multiplies each image's error: every image keeps the weight of its own timestep. `mask` (B, 1, H, W)
    multiplies the error of each position of the first B images. Raises ValueError for different shapes.
    """
    if model_pred.shape != target.shape:
        raise ValueError(f"model_pred is {tuple(model_pred.shape)}, but target is {tuple(target.shape)}")
    squares = (model_pred.float() - target.float()).square()
    if mask is not None:
        squares = torch.cat([squares[: len(mask)] * mask, squares[len(mask) :]])
    error = squares.flatten(1).mean(1)
    return error if weight is None else error * weight


def prior_preservation_loss(errors: Tensor, *, prior_loss_weight: float) -> Losses:
    """Mean error of the instance half plus `prior_loss_weight` times that of the class half.

    `errors` are (2B,), instance half first, of images of any size; with `prior_loss_weight` 0 there is no class half
    and they are (B,). Raises ValueError for an odd number of images in pairs.
    """
    if prior_loss_weight == 0:
        instance = errors.mean()
        return Losses(instance, instance, torch.zeros_like(instance))
    if len(errors) % 2:
        raise ValueError(f"expected instance/class pairs, got {len(errors)} images")
    instance, prior = (half.mean() for half in errors.chunk(2))
    return Losses(instance + prior_loss_weight * prior, instance, prior)
