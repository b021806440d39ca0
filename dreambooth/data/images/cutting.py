"""Cut pictures into squares, and convert them to tensors and PNG."""

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Square:
    """A square picture, (height, width) of its photograph, and its (top, left) corner there in the square's pixels."""

    picture: Image.Image
    original: tuple[int, int]
    corner: tuple[int, int]


def squares(
    image: Image.Image,
    *,
    resolution: int,
    crop: Literal["center", "random"],
    crops_per_image: int,
    flip: bool,
    seed: int,
) -> list[Square]:
    """Cut the largest squares of a picture and scale them to `resolution` pixels, RGB.

    "center" gives one; "random" gives `crops_per_image`, placed uniformly along the longer side, determined by the
    seed. `flip` appends the mirror image of each.
    """
    side = min(image.size)

    def scaled(top: float, left: float) -> tuple[int, int]:
        return round(top * resolution / side), round(left * resolution / side)

    slack = image.width - side, image.height - side
    if crop == "center":
        corners = [(slack[0] / 2, slack[1] / 2)]
    else:
        rng = random.Random(seed)
        corners = [(rng.random() * slack[0], rng.random() * slack[1]) for _ in range(crops_per_image)]
    # Cropping and scaling in one go never makes a large picture in between, whatever the aspect ratio.
    cut = []
    for left, top in corners:
        picture = image.resize((resolution, resolution), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
        cut.append(Square(picture=picture, original=(image.height, image.width), corner=scaled(top, left)))
    if flip:
        mirrored = [(slack[0] - left, top) for left, top in corners]
        cut += [
            Square(picture=ImageOps.mirror(square.picture), original=square.original, corner=scaled(top, left))
            for square, (left, top) in zip(cut, mirrored, strict=True)
        ]
    return cut


def to_pixels(images: Sequence[Image.Image]) -> "torch.Tensor":
    """RGB pictures of one size as float32 in [-1, 1], (N, 3, H, W)."""
    import torch

    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])  # (N, H, W, 3)
    return torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def png_bytes(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
