"""Tiny random replicas of hub repositories, one module a family: the same folders, files and settings, other sizes.

Sizes are as small as the classes allow and, where possible, all different, so that a mixed-up tensor shows in its
shape.
"""

from collections.abc import Callable
from pathlib import Path

from replicas import flux, pixart

REPLICAS: dict[str, Callable[[Path], None]] = {
    "flux-dev": flux.build,
    "flux-schnell": flux.build_schnell,
    "pixart-sigma": pixart.build,
}
"""Functions that write a repository into a folder, by name. Weights are drawn from torch's global generator."""
