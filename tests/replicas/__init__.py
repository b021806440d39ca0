"""Tiny random replicas of hub repositories, one module a family: the same folders, files and settings, other sizes.

Sizes are as small as the classes allow and, where possible, all different: a mixed-up tensor shows in its shape.
"""

from collections.abc import Callable
from pathlib import Path

from replicas import deepfloyd, sd3, sdxl, stable_diffusion

REPLICAS: dict[str, Callable[[Path], None]] = {
    "stable-diffusion-1.5": stable_diffusion.build,
    "stable-diffusion-2.1-v": stable_diffusion.build_velocity,
    "stable-diffusion-xl": sdxl.build,
    "stable-diffusion-3.5": sd3.build,
    "deepfloyd-if": deepfloyd.build,
    "stable-diffusion-3-without-t5": sd3.build_without_t5,
}
"""Functions that write a repository into a folder, by name. Weights are drawn from torch's global generator."""
