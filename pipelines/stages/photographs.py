"""A subject's photographs as the squares that samples are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.data.images import Cut, Decoded, InstanceImage, cuts, decode, png_bytes, read_image
from dreambooth.data.images.masks import Box, Mask, cut_mask, find_mask
from pipelines.tasks import MaskedPicture


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """A subject's photographs as PNG squares of the samples' side, and those that have masks."""

    squares: tuple[bytes, ...]
    masked: tuple[MaskedPicture, ...] = ()


def read_photographs(config: DreamBoothConfig, images: Sequence[InstanceImage], side: int) -> Photographs:
    """Read each of the images once, and cut it to squares of `side` pixels."""
    squares, masked, most = [], [], config.images.max_pixels
    for image in images:
        decoded = decode(read_image(image.address), image.address, max_pixels=most)
        squares.append(png_bytes(_square(decoded.image, side).picture))
        mask = find_mask(image, decoded, max_pixels=most) if config.images.masked else None
        if mask is not None:
            masked.append(_masked(decoded, mask, side, cropped=config.images.masks == "crop"))
    return Photographs(squares=tuple(squares), masked=tuple(masked))


def _masked(decoded: Decoded, mask: Mask, side: int, *, cropped: bool) -> MaskedPicture:
    subject = mask.box(at_least=1)
    square = _square(decoded.image, side, within=subject if cropped else None)
    inside = Image.fromarray((cut_mask(mask.picture, square.box, (side, side), mirrored=False) * 255).astype(np.uint8))
    alone = Image.composite(decoded.image, Image.new("RGB", decoded.image.size, "white"), mask.picture)
    return MaskedPicture(
        picture=png_bytes(square.picture),
        mask=png_bytes(inside),
        alone=png_bytes(_square(alone, side, within=subject).picture),
    )


def _square(image: Image.Image, side: int, within: Box | None = None) -> Cut:
    size = side, side
    [square] = cuts(image, size=size, crop="center", crops_per_image=1, flip=False, seed=0, within=within)
    return square
