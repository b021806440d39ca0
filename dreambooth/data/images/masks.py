"""Masks of photographs: white where the subject is, in a file of their own or in the photograph's alpha channel."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dreambooth.data.images.cutting import Size, largest_within
from dreambooth.data.images.decoding import Decoded, decode, read_image
from dreambooth.data.images.finding import InstanceImage
from dreambooth.errors import InputError

_WHITE = 128
"""The darkest value of a pixel that counts as the subject's."""
_MARGIN = 0.1
"""Room around the subject's box on each side, as a share of the box's longer side."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels, the last two excluded."""


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A mask in the size of its upright photograph (mode L), its file's content, and remarks.

    `content` is empty for an alpha channel.
    """

    picture: Image.Image
    content: bytes
    warnings: tuple[str, ...]

    def box(self, at_least: int) -> Box:
        """The subject's box with a margin, made square as far as the photograph reaches.

        Both sides have `at_least` pixels, which the photograph must have.
        """
        left, top, right, bottom = self.picture.point(lambda value: 255 * (value >= _WHITE)).getbbox() or (0, 0, 0, 0)
        longer = max(right - left, bottom - top)
        side = max(longer + 2 * round(_MARGIN * longer), at_least)
        (left, right), (top, bottom) = (
            _reach(start, stop, side, length)
            for start, stop, length in ((left, right, self.picture.width), (top, bottom, self.picture.height))
        )
        return left, top, right, bottom

    def in_the_middle(self, size: Size) -> float:
        """The share of the subject in the largest window of a size's aspect ratio in the photograph's middle."""
        white = np.asarray(self.picture) >= _WHITE
        width, height = map(int, largest_within(*self.picture.size, size))
        top, left = (white.shape[0] - height) // 2, (white.shape[1] - width) // 2
        return float(white[top : top + height, left : left + width].sum() / white.sum())


def _reach(start: int, stop: int, side: int, length: int) -> tuple[int, int]:
    """`side` pixels, or all there are, around start and stop."""
    side = min(side, length)
    first = min(max((start + stop - side) // 2, 0), length - side)
    return first, first + side


def find_mask(image: InstanceImage, decoded: Decoded, *, max_pixels: int) -> Mask | None:
    """The mask of a decoded photograph: its file, or else an alpha channel that isn't opaque throughout.

    Raises InputError for a mask that can't be read, is empty, or has another size than its photograph.
    """
    if image.mask is None:
        if decoded.alpha is None:
            return None
        return _checked(decoded.alpha, f"the alpha channel of {image.address}", b"", [])
    content = read_image(image.mask)
    own = decode(content, image.mask, max_pixels=max_pixels)
    picture, remarks = _turned(own.image.convert("L") if own.alpha is None else own.alpha, own, decoded)
    if picture.size != decoded.image.size:
        (width, height), (wanted, high) = picture.size, decoded.image.size
        raise InputError(
            f"{image.mask} is {width} x {height} pixels, but {image.address}, which it masks, is {wanted} x {high}; "
            f"save the mask in the photograph's size"
        )
    return _checked(picture, image.mask, content, remarks)


def _checked(picture: Image.Image, what: str, content: bytes, remarks: Sequence[str]) -> Mask:
    brightest = int(np.asarray(picture).max())
    if brightest < _WHITE:
        raise InputError(
            f"{what} is empty: its brightest pixel is {brightest} of 255; the subject has to be white, all else black"
        )
    return Mask(
        picture=picture,
        content=content,
        warnings=tuple(f"{what} {remark}" for remark in (*remarks, *_doubts(np.asarray(picture) >= _WHITE))),
    )


def _doubts(white: np.ndarray) -> Iterator[str]:
    """Remarks on a mask (H, W) that may be meant otherwise."""
    rows, columns = (length // 4 for length in white.shape)
    middle = white[rows : white.shape[0] - rows, columns : white.shape[1] - columns]
    edge = np.concatenate((white[0], white[-1], white[:, 0], white[:, -1]))
    if white.all():
        yield "is white throughout, so it masks nothing"
    elif edge.mean() > 0.5 > middle.mean():
        yield "looks inverted: white at the edge, black in the middle; the subject has to be white"


def _turned(picture: Image.Image, own: Decoded, photograph: Decoded) -> tuple[Image.Image, list[str]]:
    """A mask turned as its photograph is by its EXIF tag, where it was made from the pixels as they are stored."""
    if photograph.orientation == 1 or own.orientation != 1:
        return picture, []
    if picture.size == photograph.image.size:
        return picture, ["has no EXIF orientation, but its photograph has, and is taken as upright"]
    tagged = picture.copy()
    tagged.getexif()[ExifTags.Base.Orientation] = photograph.orientation
    return ImageOps.exif_transpose(tagged), []


def cut_mask(mask: Image.Image | None, box: Sequence[float], size: Size, *, mirrored: bool) -> np.ndarray:
    """A mask's area averages of `size` in [0, 1] over a window of its photograph; without one all is subject."""
    if mask is None:
        return np.ones(size, np.float32)
    left, top, right, bottom = box
    cut = mask.convert("F").resize((size[1], size[0]), Image.Resampling.BOX, (left, top, right, bottom))
    averages = np.asarray(cut, dtype=np.float32) / 255
    return averages[:, ::-1] if mirrored else averages
