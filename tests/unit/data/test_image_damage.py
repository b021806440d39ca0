"""Pictures of which a part is missing are refused by name, and no sound one is."""

import io
import re
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageDraw, ImageFilter

from dreambooth.data.images import Decoded, decode, find_instance_images
from dreambooth.data.inspection import inspect_images
from dreambooth.errors import InputError

pillow_heif.register_heif_opener(thumbnails=False)

ENCODINGS: dict[str, tuple[str, dict[str, object]]] = {
    "png": ("PNG", {}),
    "jpeg": ("JPEG", {"quality": 75}),
    "jpeg with tables of its own": ("JPEG", {"quality": 90, "optimize": True}),
    "jpeg of full colour": ("JPEG", {"quality": 95, "subsampling": 0}),
    "jpeg with restart markers": ("JPEG", {"restart_marker_rows": 1}),
    "progressive jpeg": ("JPEG", {"quality": 90, "progressive": True}),
    "webp": ("WEBP", {}),
    "lossless webp": ("WEBP", {"lossless": True, "method": 1}),
    "avif": ("AVIF", {"speed": 10}),
    "heic": ("HEIF", {}),
    "jpeg 2000": ("JPEG2000", {"quality_layers": [20], "irreversible": True}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "ppm": ("PPM", {}),
    "qoi": ("QOI", {}),
    "tiff": ("TIFF", {}),
    "tiff, LZW": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff, deflate": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "tiff, PackBits": ("TIFF", {"compression": "packbits"}),
    "tiff, JPEG": ("TIFF", {"compression": "jpeg"}),
}
BLOCK = 4096


def photograph(seed: int, width: int = 400, height: int = 300) -> Image.Image:
    """Smooth colours with a sensor's noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(30, 226, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8))


def drawing(width: int, height: int, ground: str) -> Image.Image:
    """Flat areas, sharp edges, and a black strip at the bottom."""
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 4, height // 4, width // 2, height // 2), fill="red", outline="black", width=3)
    draw.rectangle((width // 2, height // 9, width * 8 // 9, height // 3), fill="blue")
    draw.rectangle((0, height * 2 // 3, width, height), fill="black")
    return image


def letterbox(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height))
    image.paste(photograph(1, width, height // 2), (0, height // 4))
    return image


SOUND: dict[str, Image.Image] = {
    "a photograph": photograph(0),
    "white": Image.new("RGB", (600, 600), "white"),
    "black": Image.new("RGB", (600, 600), "black"),
    "one pixel": Image.new("RGB", (1, 1), "red"),
    "a drawing on white": drawing(500, 311, "white"),
    "a drawing on black": drawing(257, 400, "black"),
    "a letterbox": letterbox(400, 300),
    "a gradient": Image.linear_gradient("L").resize((300, 300)).convert("RGB"),
    "out of focus": photograph(3).filter(ImageFilter.GaussianBlur(20)),
}


@cache
def whole(kind: str) -> bytes:
    return encoded(photograph(7), kind)


def encoded(image: Image.Image, kind: str) -> bytes:
    name, options = ENCODINGS[kind]
    out = io.BytesIO()
    image.save(out, name, **options)
    return out.getvalue()


def opened(content: bytes) -> Decoded:
    return decode(content, "photo", max_pixels=10_000_000)


def zeroed(content: bytes, start: int, stop: int) -> bytes:
    return content[:start] + bytes(stop - start) + content[stop:]


def ended(content: bytes) -> bytes:
    """What closes the file as the format wants it."""
    return content[-2:] if content.startswith(b"\xff\xd8") else b""


def second_half_zeros(content: bytes) -> bytes:
    return zeroed(content, len(content) // 2, len(content))


def second_half_zeros_but_the_end(content: bytes) -> bytes:
    end = ended(content)
    return zeroed(content, len(content) // 2, len(content) - len(end))


def zeros_from_a_block_on(content: bytes) -> bytes:
    return zeroed(content, len(content) * 2 // 3 // BLOCK * BLOCK, len(content))


def a_block_of_zeros(content: bytes) -> bytes:
    start = len(content) // 2 // BLOCK * BLOCK
    return zeroed(content, start, start + BLOCK)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def cut_and_closed(content: bytes) -> bytes:
    return content[: len(content) // 2] + ended(content)


@pytest.mark.parametrize(
    "accident",
    [
        second_half_zeros,
        second_half_zeros_but_the_end,
        zeros_from_a_block_on,
        a_block_of_zeros,
        cut,
        cut_and_closed,
    ],
)
@pytest.mark.parametrize("kind", ENCODINGS)
def test_a_missing_part_is_found(kind: str, accident: Callable[[bytes], bytes]) -> None:
    content = whole(kind)
    assert len(content) > 2 * BLOCK
    opened(content)
    with pytest.raises(InputError, match=r"^photo is (damaged: |no JPEG, .* or its beginning is damaged)"):
        opened(accident(content))


@pytest.mark.parametrize("kind", ["png", "jpeg", "progressive jpeg", "webp", "avif", "heic", "jpeg 2000", "gif"])
def test_what_erased_memory_reads_as_is_found(kind: str) -> None:
    content = whole(kind)
    start = len(content) // 2 // BLOCK * BLOCK
    for stop in (start + BLOCK, len(content)):
        with pytest.raises(InputError):
            opened(content[:start] + b"\xff" * (stop - start) + content[stop:])


@pytest.mark.parametrize("picture", SOUND)
@pytest.mark.parametrize("kind", [*ENCODINGS])
def test_a_sound_picture_is_no_false_alarm(kind: str, picture: str) -> None:
    decoded = opened(encoded(SOUND[picture], kind))
    assert decoded.image.size == SOUND[picture].size
    assert decoded.warnings == ()


def jpeg(**options: object) -> bytes:
    out = io.BytesIO()
    photograph(9).save(out, "JPEG", **options)
    return out.getvalue()


def with_surplus(content: bytes, surplus: bytes) -> bytes:
    """Bytes that no code needs, before the end marker."""
    return content[:-2] + surplus + content[-2:]


def odd_scan_header(content: bytes) -> bytes:
    """As some phones write it: with parameters that mean something in progressive files only."""
    header = content.index(b"\xff\xda") + 2
    length = int.from_bytes(content[header : header + 2], "big")
    return content[: header + length - 3] + b"\x00\x00\x00" + content[header + length :]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(jpeg() + bytes(5000), id="zeros behind the end"),
        pytest.param(jpeg() + jpeg(quality=20)[:900], id="half a further picture behind the end"),
        pytest.param(odd_scan_header(jpeg()), id="an odd header"),
        pytest.param(jpeg(comment=b"x" * 2000 + bytes(2000), exif=b"Exif\0\0" + bytes(3000)), id="zeros in metadata"),
        pytest.param(jpeg(keep_rgb=True), id="RGB"),
    ],
)
def test_oddities_of_cameras_are_no_false_alarm(content: bytes) -> None:
    assert opened(content).warnings == ()


def test_damage_is_found_behind_an_odd_header() -> None:
    with pytest.raises(InputError, match="premature end"):
        opened(cut_and_closed(odd_scan_header(jpeg())))


def test_a_few_bytes_too_many_are_a_warning_and_many_are_damage() -> None:
    (warning,) = opened(with_surplus(jpeg(), b"\x55" * 36)).warnings
    assert re.search(r"3\d bytes too many", warning)
    with pytest.raises(InputError, match=r"\d{4} extraneous bytes"):
        opened(with_surplus(jpeg(), b"\x55" * 2000))


def test_a_progressive_jpeg_without_its_last_scans() -> None:
    """It is well-formed, and libjpeg has no objection."""
    content = jpeg(progressive=True)
    last = content.rindex(b"\xff\xda")
    with pytest.raises(InputError, match="the last of its scans are missing"):
        opened(content[:last] + b"\xff\xd9")


def test_a_png_whose_data_was_changed_but_decodes() -> None:
    """Stored without compression, so that no code is broken: only the checksums know."""
    out = io.BytesIO()
    photograph(3).save(out, "PNG", compress_level=0)
    content = zeroed(out.getvalue(), 40_000, 44_000)
    with pytest.raises(InputError, match=r"should have the checksum [0-9a-f]{8}, but has [0-9a-f]{8}|broken"):
        opened(content)


def test_a_png_without_its_end() -> None:
    with pytest.raises(InputError, match=r"should end at byte \d+, but it has \d+ bytes"):
        opened(encoded(photograph(3), "png")[:-12])


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_png_that_was_closed_early() -> None:
    content = encoded(photograph(3), "png")
    size = int.from_bytes(content[33:37], "big")
    data = content[41 : 41 + size]
    with pytest.raises(InputError, match="photo is damaged"):
        opened(content[:33] + png_chunk(b"IDAT", data[: size // 2]) + png_chunk(b"IEND", b""))


def test_an_alpha_channel_and_the_first_frame_of_an_animation_are_looked_at() -> None:
    out = io.BytesIO()
    photograph(1).save(out, "WEBP", save_all=True, append_images=[photograph(2)])
    content = out.getvalue()
    start = content.index(b"VP8 ") + 8
    size = int.from_bytes(content[start - 4 : start], "little")
    assert "2 frames" in opened(content).warnings[0]
    with pytest.raises(InputError, match="where its codes should be"):
        opened(zeroed(content, start + size // 2, start + size))


def test_all_damaged_pictures_are_named_before_work_starts(tmp_path: Path) -> None:
    kinds = {"a.jpg": "jpeg", "b.jpg": "progressive jpeg", "c.webp": "lossless webp", "d.png": "png", "e.heic": "heic"}
    for name, kind in kinds.items():
        (tmp_path / name).write_bytes(second_half_zeros_but_the_end(encoded(photograph(5), kind)))
    (tmp_path / "sound.png").write_bytes(encoded(photograph(6), "png"))
    with pytest.raises(InputError) as caught:
        inspect_images(find_instance_images((str(tmp_path),)), resolution=64, max_pixels=1_000_000)
    faults = str(caught.value).splitlines()
    assert [Path(fault.split(" is ")[0]).name for fault in faults] == list(kinds)
    assert all("replace it or take it out of the images" in fault for fault in faults)
