"""The latent cache: the VAE sees every image once; each step samples the posterior anew.

Keeping one sample instead would freeze the VAE's noise into the data; keeping mean and std costs twice the memory of
latents, which are a fortieth of the pixels, and the VAE can be freed before training starts.
"""

from dataclasses import dataclass
from pathlib import Path

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


def load_vae(directory: Path, device: str) -> AutoencoderKL:
    """The frozen VAE of a pipeline directory, in fp32: some SD VAEs overflow in fp16."""
    vae = AutoencoderKL.from_pretrained(
        directory, subfolder="vae", dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    return vae.to(device).requires_grad_(False).eval()


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pixels: Tensor, *, batch_size: int = 8) -> LatentCache:
    """Encode pixels (N, 3, H, W) in [-1, 1] to a cache, scaled and shifted as the VAE's own configuration says."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    means, stds = [], []
    for batch in pixels.split(batch_size):
        posterior = vae.encode(batch.to(vae.device)).latent_dist
        means.append((posterior.mean.cpu() - shift) * vae.config.scaling_factor)
        stds.append(posterior.std.cpu() * vae.config.scaling_factor)
    return LatentCache(mean=torch.cat(means), std=torch.cat(stds))
