"""What the tests of refusals share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

CPUS = 8
Refused = Callable[..., str]


def save(path: Path, width: int = 80, height: int = 72) -> Path:
    """A sound picture that does not compress."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path
