"""Detect damaged image files: decoders fill parts lost to an interrupted copy or a full disk with grey or black.

Such accidents leave a missing end, an end of zeros (where the length was set beforehand), or a hole of zeros. Each
format has its own check:

- PNG carries a checksum for each of its parts.
- JPEG and WebP are codes without gaps: decoded wrongly, they need more bits, or fewer, than there are.
- AVIF, HEIC, JPEG 2000, QOI and compressed TIFFs never code runs of zeros (the first three none of 0xFF either), or
  have checksums.
- BMP, PPM and plain TIFFs are numbers, possibly zero. But photographs have no run of zeros that begins within a row,
  is at least as long as one, and has hardly a zero above. (A shorter hole is not found.)
- GIF has blocks of stated lengths, over which its decoder trips by itself.
"""

import zlib

import numpy as np
from PIL import Image, ImageFile

from dreambooth.data.images.bmff import coded_items
from dreambooth.data.images.errors import Damage
from dreambooth.data.images.jpeg import check_jpeg
from dreambooth.data.images.webp import check_webp
from dreambooth.data.images.zeros import long_run

_J2K_DATA, _QOI_HEADER_BYTES = b"\xff\x93", 14
_TIFF_PARTS = ((273, 279), (324, 325))
"""Tags of the offsets and lengths of strips or tiles."""
_TIFF_COMPRESSION, _TIFF_JPEG_TABLES = 259, 347
_FEW = 0.05
"""Largest share of zeros in a sound dark photograph."""
_LZW, _JPEG, _PACKBITS, _DEFLATE = 5, 7, 32773, (8, 32946)


def row_order(image: ImageFile.ImageFile) -> int:
    """Row order of an uncompressed file, read before decoding: 1 downwards, -1 upwards, 0 compressed."""
    if not image.tile or any(tile[0] != "raw" for tile in image.tile):
        return 0
    arguments = image.tile[0][3]
    return arguments[2] if isinstance(arguments, tuple) and len(arguments) > 2 else 1


def check_whole(content: bytes, image: Image.Image, rows: int) -> list[str]:
    """Raise `Damage` if a part of the file is missing or zeroed; returns remarks on oddities.

    `image` is decoded from `content`, and `rows` is its `row_order`.
    """
    match image.format:
        case "PNG":
            _check_png(content)
        case "JPEG" | "MPO":
            return check_jpeg(content)
        case "WEBP":
            check_webp(content)
        case "AVIF" | "HEIF":
            for start, stop in coded_items(content):
                _check_run(content, start, stop, 0x00, 0xFF)
        case "JPEG2000":
            _check_run(content, content.find(_J2K_DATA), len(content), 0x00, 0xFF)
        case "QOI":
            _check_run(content, _QOI_HEADER_BYTES, len(content))
        case "TIFF" if not rows:
            return _check_tiff(content, image)
        case _ if rows:
            _check_rows(content, np.asarray(image)[::rows])
    return []


def _check_png(content: bytes) -> None:
    position, kind = 8, b""
    while kind != b"IEND":
        stop = position + 8 + int.from_bytes(content[position : position + 4], "big")
        kind = content[position + 4 : position + 8]
        if stop + 4 > len(content):
            raise Damage(f"a part of it should end at byte {stop + 4}, but it has {len(content)} bytes")
        stated, counted = int.from_bytes(content[stop : stop + 4], "big"), zlib.crc32(content[position + 4 : stop])
        if stated != counted:
            raise Damage(f"its part at byte {position} should have the checksum {stated:08x}, but has {counted:08x}")
        position = stop + 4


def _check_run(content: bytes, start: int, stop: int, *fills: int) -> None:
    """Raise `Damage` for a long run of one of these bytes, by default of zeros."""
    for fill in fills or (0x00,):
        if (run := long_run(content, start, stop, fill=fill)) is not None:
            raise Damage(f"{run}, where a whole one has none")


def _check_tiff(content: bytes, image: Image.Image) -> list[str]:
    tags = getattr(image, "tag_v2", {})
    compression = tags.get(_TIFF_COMPRESSION)
    parts = [part for tag, size in _TIFF_PARTS for part in zip(tags.get(tag, ()), tags.get(size, ()), strict=False)]
    remarks = []
    for start, size in parts:
        if compression in (_LZW, _PACKBITS):
            _check_run(content, start, start + size)
        elif compression in _DEFLATE and long_run(content, start, start + size):
            zlib.decompress(content[start : start + size])  # checks the sum at its end; libtiff may not come that far
        elif compression == _JPEG:
            # Each is a JPEG; tables that all of them share go behind its first marker.
            part, tables = content[start : start + size], bytes(tags.get(_TIFF_JPEG_TABLES, b""))[2:-2]
            remarks += check_jpeg(part[:2] + tables + part[2:])
    return list(dict.fromkeys(remarks))


def _check_rows(content: bytes, pixels: np.ndarray) -> None:
    """Pixels (H, W) or (H, W, C), rows as they lie in the file."""
    width = pixels.shape[1]
    if bytes(max(width // 8, 1)) not in content:  # a row of zeros has as many bytes at least, at one bit per pixel
        return
    zero = np.logical_not(pixels.reshape(pixels.shape[0] * width, -1)).all(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], zero, [False]))))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        above = zero[max(start - width, 0) : start]
        if stop - start >= width and start % width and above.mean() < _FEW:
            raise Damage(f"its {stop - start} pixels from number {start} on are zeros, and begin within a row")
