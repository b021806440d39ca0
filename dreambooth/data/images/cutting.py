"""Cut pictures into squares, and convert them to tensors and PNG."""

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Square:
    """A square picture, (height, width) of its photograph, and its (top, left) corner there in the square's pixels.

    `box` is (left, top, right, bottom) in the photograph's pixels, before the square was `mirrored`.
    """

    picture: Image.Image
    original: tuple[int, int]
    corner: tuple[int, int]
    box: tuple[float, float, float, float]
    mirrored: bool = False


def squares(
    image: Image.Image,
    *,
    resolution: int,
    crop: Literal["center", "random"],
    crops_per_image: int,
    flip: bool,
    seed: int,
    within: tuple[int, int, int, int] | None = None,
) -> list[Square]:
    """Cut the largest squares of a picture and scale them to `resolution` pixels, RGB.

    "center" gives one; "random" gives `crops_per_image`, placed uniformly along the longer side, determined by the
    seed. `flip` appends the mirror image of each. `within` is the box they are cut from (left, top, right, bottom).
    """
    first_left, first_top, right, bottom = within or (0, 0, *image.size)
    side = min(right - first_left, bottom - first_top)

    def scaled(top: float, left: float) -> tuple[int, int]:
        return round(top * resolution / side), round(left * resolution / side)

    slack = right - first_left - side, bottom - first_top - side
    if crop == "center":
        corners = [(slack[0] / 2, slack[1] / 2)]
    else:
        rng = random.Random(seed)
        corners = [(rng.random() * slack[0], rng.random() * slack[1]) for _ in range(crops_per_image)]
    # Cropping and scaling in one go never makes a large picture in between, whatever the aspect ratio.
    cut = []
    for left, top in ((first_left + left, first_top + top) for left, top in corners):
        box = left, top, left + side, top + side
        picture = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box)
        cut.append(Square(picture=picture, original=(image.height, image.width), corner=scaled(top, left), box=box))
    if flip:
        cut += [
            replace(
                square,
                picture=ImageOps.mirror(square.picture),
                corner=scaled(square.box[1], image.width - side - square.box[0]),
                mirrored=True,
            )
            for square in cut
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
