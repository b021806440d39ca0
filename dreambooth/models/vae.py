"""Encode and decode with a VAE in fp32, so few images at once that their memory is bounded."""

from typing import Any

import torch
from torch import Tensor

PIXELS_AT_ONCE = 1024**2
"""The decoder of Stable Diffusion takes about 3.5 GiB of activations for so many, and eight times that for a batch of
eight: more than the denoiser that sampled them."""


def encode(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std (N, C, h, w), fp32 on the CPU, of the posterior of pixels (N, 3, H, W) in [-1, 1]."""
    parts = pixels.split(_images_at_once(pixels.shape[-2], pixels.shape[-1]))
    posteriors = [vae.encode(part.to(vae.device)).latent_dist for part in parts]
    mean = torch.cat([posterior.mean.cpu() for posterior in posteriors])
    return mean, torch.cat([posterior.std.cpu() for posterior in posteriors])


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels (N, 3, H, W) in [-1, 1] of latents (N, C, h, w) in the VAE's own scale."""
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    parts = latents.split(_images_at_once(scale * latents.shape[-2], scale * latents.shape[-1]))
    return torch.cat([vae.decode(part).sample for part in parts])


def _images_at_once(height: int, width: int) -> int:
    return max(1, PIXELS_AT_ONCE // (height * width))
