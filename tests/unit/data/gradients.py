"""A picture that differs from its mirror images."""

import numpy as np
from PIL import Image


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)
    pixels = np.stack(np.broadcast_arrays(x[None, :], y[:, None], 128.0), axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))
