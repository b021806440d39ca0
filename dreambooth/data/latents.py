"""The latent cache: the VAE encodes every image once; each step samples the posterior anew.

Keeping one sample instead would freeze the VAE's noise into the data; keeping mean and std costs twice the memory of
latents, which are a fortieth of the pixels, and the VAE can be freed before training starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreambooth.models.families import Family


@dataclass(frozen=True, kw_only=True)
class LatentCache:
    """Posterior mean and std (N, C, H, W), fp32, on the CPU, already in the denoiser's scale.

    Of a family that works on pixels the mean holds them, and std is 0.
    """

    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, index: int, noise: Tensor) -> Tensor:
        """x0 (C, H, W) of one image for standard normal noise of that shape."""
        return self.mean[index] + self.std[index] * noise

    @classmethod
    def joined(cls, parts: "Sequence[LatentCache]") -> "LatentCache":
        """All images of several caches."""
        return cls(mean=torch.cat([part.mean for part in parts]), std=torch.cat([part.std for part in parts]))


@torch.no_grad()
def encode_latents(family: Family, vae: Any, pixels: Tensor, *, batch_size: int = 8) -> LatentCache:
    """Encode pixels (N, 3, H, W) in [-1, 1], scaled and shifted by the VAE's configuration."""
    parts = [family.encode_images(vae, batch) for batch in pixels.split(batch_size)]
    return LatentCache.joined([LatentCache(mean=mean, std=std) for mean, std in parts])
