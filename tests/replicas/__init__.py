"""Tiny random replicas of the hub repositories of each family, built by diffusers' own classes."""

from collections.abc import Callable
from pathlib import Path

from tests.replicas import flux, pixart

REPLICAS: dict[str, Callable[[Path], None]] = {
    "flux-dev": flux.build,
    "flux-schnell": flux.build_schnell,
    "pixart-sigma": pixart.build,
}
