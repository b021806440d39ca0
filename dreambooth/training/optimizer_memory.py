"""Memory of optimizers, by the shapes of the parameters."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from dreambooth.models.base_settings import BaseSettings

UPDATE_BYTES = {"adamw": 0, "adamw8bit": 53, "adafactor": 11}
"""Largest number of bytes beside state and gradient while a parameter is updated, for each of its values."""

_BLOCK = 256
_SMALLEST_QUANTIZED = 4096
_MAP_BYTES = 1024


def moments_bytes(optimizer: str, shapes: Iterable[Sequence[int]]) -> int:
    """Bytes that an optimizer keeps from step to step for parameters of these shapes, in fp32 where not in 8 bits."""
    return sum(_moments(optimizer, shape) for shape in shapes)


def _moments(optimizer: str, shape: Sequence[int]) -> int:
    values = math.prod(shape)
    if optimizer == "adafactor":
        # Sums over the last dimension and the one before it.
        return 4 * (values // shape[-1] + values // shape[-2]) if len(shape) > 1 else 4 * values
    if optimizer == "adamw8bit" and values >= _SMALLEST_QUANTIZED and values % _BLOCK == 0:
        return 2 * (values + 4 * values // _BLOCK + _MAP_BYTES)  # codes, scales of blocks, what codes mean
    return 8 * values


def trained_shapes(directory: Path, text_encoders: Sequence[str]) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a base model's denoiser and of these text encoders, by their configurations."""
    family = BaseSettings(directory).family
    modules = [family.empty(directory, folder, device="meta") for folder in (family.denoiser.folder, *text_encoders)]
    return [tuple(parameter.shape) for module in modules for parameter in module.parameters()]
