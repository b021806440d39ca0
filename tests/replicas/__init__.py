"""Tiny random replicas of hub repositories, one module a family: the same folders, files and settings, other sizes.

Sizes are as small as the classes allow and, where possible, all different: a mixed-up tensor shows in its shape.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from replicas import deepfloyd, flux, pixart, sd3, sdxl, stable_diffusion

REPLICAS: dict[str, Callable[[Path], None]] = {
    "stable-diffusion-1.5": stable_diffusion.build,
    "stable-diffusion-2.1-v": stable_diffusion.build_velocity,
    "stable-diffusion-xl": sdxl.build,
    "stable-diffusion-3.5": sd3.build,
    "deepfloyd-if": deepfloyd.build,
    "stable-diffusion-3-without-t5": sd3.build_without_t5,
    "flux-dev": flux.build,
    "flux-schnell": flux.build_schnell,
    "pixart-sigma": pixart.build,
}
"""Functions that write a repository into a folder, by name. Weights are drawn from torch's global generator."""


def built(name: str, folder: Path, *, seed: int = 0) -> Path:
    """A replica in a new folder, which is returned, with the same weights for a seed whatever was drawn before."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        REPLICAS[name](folder)
    return folder
