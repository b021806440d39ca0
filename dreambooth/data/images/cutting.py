"""Cut pictures to a size, and convert them to tensors and PNG."""

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    import torch


Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A picture of the size asked for, (height, width) of its photograph, and its (top, left) corner there.

    `corner` is in the cut's pixels, `box` (left, top, right, bottom) in the photograph's, before the cut was
    `mirrored`.
    """

    picture: Image.Image
    original: Size
    corner: tuple[int, int]
    box: tuple[float, float, float, float]
    mirrored: bool = False

    @property
    def size(self) -> Size:
        """Height and width of the picture."""
        return self.picture.height, self.picture.width


def largest_within(width: int, height: int, size: Size) -> tuple[float, float]:
    """Width and height of the largest window of a picture with the aspect ratio of `size`."""
    high, wide = size
    if width * high <= height * wide:
        return width, width * high / wide
    return height * wide / high, height


def cuts(
    image: Image.Image,
    *,
    size: Size,
    crop: Literal["center", "random"],
    crops_per_image: int,
    flip: bool,
    seed: int,
    within: tuple[int, int, int, int] | None = None,
) -> list[Cut]:
    """Cut the largest windows of a size's aspect ratio from a picture and scale them to it, RGB.

    "center" gives one; "random" gives `crops_per_image`, placed uniformly along the side that is too long, determined
    by the seed. `flip` appends the mirror image of each. `within` is the box they are cut from (left, top, right,
    bottom).
    """
    first_left, first_top, right, bottom = within or (0, 0, *image.size)
    width, height = largest_within(right - first_left, bottom - first_top, size)

    def scaled(top: float, left: float) -> tuple[int, int]:
        return round(top * size[0] / height), round(left * size[1] / width)

    slack = right - first_left - width, bottom - first_top - height
    if crop == "center":
        corners = [(slack[0] / 2, slack[1] / 2)]
    else:
        rng = random.Random(seed)
        corners = [(rng.random() * slack[0], rng.random() * slack[1]) for _ in range(crops_per_image)]
    # Cropping and scaling in one go never makes a large picture in between, whatever the aspect ratio.
    made = []
    for left, top in ((first_left + left, first_top + top) for left, top in corners):
        # Rounding must not reach beyond the picture, which Pillow refuses.
        box = left, top, min(left + width, right), min(top + height, bottom)
        picture = image.resize((size[1], size[0]), Image.Resampling.LANCZOS, box)
        made.append(Cut(picture=picture, original=(image.height, image.width), corner=scaled(top, left), box=box))
    if flip:
        made += [
            replace(
                cut,
                picture=ImageOps.mirror(cut.picture),
                corner=scaled(cut.box[1], image.width - width - cut.box[0]),
                mirrored=True,
            )
            for cut in made
        ]
    return made


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
