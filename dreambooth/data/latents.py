"""The latent cache: the VAE encodes every image once; each step samples the posterior anew.

Keeping one sample instead would freeze the VAE's noise into the data; keeping mean and std costs twice the memory of
latents, which are a fortieth of the pixels, and the VAE can be freed before training starts.
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LatentCache:
    """Posterior mean and std (N, C, H, W), fp32, on the CPU, already in the denoiser's scale."""

    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, index: int, noise: Tensor) -> Tensor:
        """Latents (C, H, W) of one image for standard normal noise of that shape."""
        return self.mean[index] + self.std[index] * noise


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pixels: Tensor, *, batch_size: int = 8) -> LatentCache:
    """Encode pixels (N, 3, H, W) in [-1, 1], scaled and shifted by the VAE's configuration."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    means, stds = [], []
    for batch in pixels.split(batch_size):
        posterior = vae.encode(batch.to(vae.device)).latent_dist
        means.append((posterior.mean.cpu() - shift) * vae.config.scaling_factor)
        stds.append(posterior.std.cpu() * vae.config.scaling_factor)
    return LatentCache(mean=torch.cat(means), std=torch.cat(stds))
