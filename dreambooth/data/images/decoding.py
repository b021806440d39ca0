"""Decode image files to upright, opaque, 8-bit sRGB. Raises InputError for damaged ones."""

import io
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dreambooth.data.images.access import read_file
from dreambooth.data.images.colour import to_srgb
from dreambooth.data.images.damage import check_whole, row_order
from dreambooth.data.images.errors import Undefined
from dreambooth.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "TIFF", "GIF", "BMP", "DIB", "JPEG2000", "PPM", "QOI")
"""Supported formats, by Pillow's names."""
_NAMES = "JPEG, PNG, WebP, AVIF, HEIC, TIFF, GIF, BMP, JPEG 2000, PPM or QOI"


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """An upright RGB picture, and remarks on its conversion.

    `alpha` is its opacity (mode L), None if it is opaque throughout; `orientation` is the EXIF tag it was turned by.
    """

    image: Image.Image
    warnings: tuple[str, ...]
    alpha: Image.Image | None = None
    orientation: int = 1


def read_image(address: str) -> bytes:
    """Read an image file. Raises InputError with its name and the cause if it can't be read."""
    return read_file(address)


def open_image(address: str, *, max_pixels: int) -> Image.Image:
    """Read and decode an image as `decode` does. Raises InputError if it can't be read."""
    return decode_image(read_image(address), address, max_pixels=max_pixels)


def decode_image(content: bytes, address: str, *, max_pixels: int) -> Image.Image:
    """Decode an image as `decode` does, without its remarks."""
    return decode(content, address, max_pixels=max_pixels).image


def decode(content: bytes, address: str, *, max_pixels: int) -> Decoded:
    """Decode an image file as upright sRGB on white; only the first of several frames is used.

    Raises InputError, naming the file and the cause, if it has more than `max_pixels` (by its header, before anything
    is decoded), is empty, is damaged (`damage.check_whole`), or is in none of FORMATS; its content says
    which, not its name.
    """
    _register_heif()
    try:
        with warnings.catch_warnings():
            # Pillow warns of broken metadata, and of large pictures at a size that is not ours.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            _check_pixels(image.size, address, max_pixels)
            rows = row_order(image)
            image.load()
            remarks = [*_frames(image), *check_whole(content, image, rows)]
            orientation = _orientation(image)
            rgb, alpha, colour_remarks = to_srgb(_upright(image))
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{address} is refused by Pillow, before decoding: {error}; make it smaller") from None
    except Undefined as error:
        raise InputError(f"{address} can't be used: {error}") from None
    except UnidentifiedImageError:
        raise InputError(_unidentified(len(content), address)) from None
    except Exception as error:  # noqa: BLE001 - decoders raise all kinds: OSError, SyntaxError, struct.error
        raise InputError(f"{address} is damaged: {error}; replace it or take it out of the images") from None
    if alpha is not None and alpha.getextrema() == (255, 255):
        alpha = None
    return Decoded(image=rgb, warnings=(*remarks, *colour_remarks), alpha=alpha, orientation=orientation)


@cache
def _register_heif() -> None:
    """Register HEIC with Pillow, which reads AVIF itself."""
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)


def _check_pixels(size: tuple[int, int], address: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise InputError(
            f"{address} is {width} x {height} = {width * height} pixels, but images.max_pixels is {max_pixels}; "
            f"make it smaller or raise images.max_pixels"
        )


def _unidentified(size: int, address: str) -> str:
    if not size:
        return f"{address} is empty (0 bytes); replace it or take it out of the images"
    return (
        f"{address} is no {_NAMES}, or its beginning is damaged ({size} bytes); convert it or take it out of the images"
    )


def _frames(image: Image.Image) -> Iterator[str]:
    """Remarks on further frames, except in JPEGs, where phones append invisible depth maps and exposures."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        yield f"holds {frames} frames or pages, of which only the first is used; save others as pictures of their own"


def _orientation(image: Image.Image) -> int:
    """The EXIF tag by which a picture is turned; 1: it is upright, or a broken block doesn't say."""
    with suppress(Exception):
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _upright(image: Image.Image) -> Image.Image:
    # A broken EXIF block has no orientation; the picture itself is sound.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image
