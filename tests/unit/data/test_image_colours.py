"""Every mode that Pillow opens comes out in sRGB, by its profile, against ImageCms and the formulas themselves."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from dreambooth.data.images import Decoded, decode
from dreambooth.errors import InputError

pillow_heif.register_heif_opener(thumbnails=False)
SIDE = 48


def icc(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """A colour profile (ICC.1, version 2): `space` in its four letters, `tags` and what they hold."""
    described = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {b"desc": described, b"wtpt": xyz(0.9642, 1, 0.8249), **tags}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    white = struct.pack(">iii", 63190, 65536, 54061)
    device = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4xI", start + len(body), 0x02400000) + device + space + connection + bytes(12) + b"acsp"
    return header.ljust(68, b"\0") + white + bytes(48) + struct.pack(">I", len(tags)) + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def inks() -> bytes:
    """A table (lut8) from four inks to Lab, at its corners only."""
    corners = [[bits >> shift & 1 for shift in (3, 2, 1, 0)] for bits in range(16)]
    lab = [
        value
        for c, m, y, k in corners
        for value in (round(255 * (1 - k) * (1 - 0.3 * c - 0.3 * m - 0.1 * y)), 128 - 60 * c + 70 * m, 128 + 90 * y)
    ]
    identity = struct.pack(">9i", *(65536 if place in (0, 4, 8) else 0 for place in range(9)))
    ramp = bytes(range(256))
    return b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + ramp * 4 + bytes(lab) + ramp * 3


_LIGHTS = {b"rXYZ": xyz(0.515, 0.241, -0.001), b"gXYZ": xyz(0.292, 0.692, 0.042), b"bXYZ": xyz(0.157, 0.067, 0.784)}
PROFILES = {
    "RGB": icc(b"RGB ", _LIGHTS | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(1.8))),
    "GRAY": icc(b"GRAY", {b"kTRC": curve(1.0)}),
    "CMYK": icc(b"CMYK", {b"A2B0": inks()}, b"Lab "),
}


def srgb_of(image: Image.Image, profile: bytes) -> np.ndarray:
    """What ImageCms makes of a picture in the profile's own space."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None
    return np.asarray(converted).astype(int)


def ramp(low: int = 0, high: int = 255) -> Image.Image:
    return Image.fromarray(np.tile(np.linspace(low, high, SIDE).round().astype(np.uint8), (SIDE, 1)))


def colours() -> Image.Image:
    return Image.merge("RGB", (ramp(), ramp().rotate(90), ramp(200, 40)))


def half_opaque() -> Image.Image:
    return Image.fromarray(np.tile(np.linspace(0, 255, SIDE).round().astype(np.uint8)[:, None], (1, SIDE)))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def opened(content: bytes) -> Decoded:
    return decode(content, "photo", max_pixels=1_000_000)


def pixels(decoded: Decoded) -> np.ndarray:
    assert decoded.image.mode == "RGB"
    return np.asarray(decoded.image).astype(int)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(float) / 255
    return colour * share + 255 * (1 - share)


FOLLOWED = [
    ("RGB", "PNG", "RGB"),
    ("RGB", "JPEG", "RGB"),
    ("RGB", "WEBP", "RGB"),
    ("RGB", "TIFF", "RGB"),
    ("RGB", "AVIF", "RGB"),
    ("RGB", "HEIF", "RGB"),
    ("YCbCr", "TIFF", "RGB"),
    ("P", "PNG", "RGB"),
    ("P", "TIFF", "RGB"),
    ("L", "PNG", "RGB"),
    ("L", "JPEG", "RGB"),
    ("L", "PNG", "GRAY"),
    ("L", "JPEG", "GRAY"),
    ("L", "TIFF", "GRAY"),
    ("1", "PNG", "GRAY"),
    ("CMYK", "JPEG", "CMYK"),
    ("CMYK", "TIFF", "CMYK"),
]


@pytest.mark.parametrize(("mode", "kind", "space"), FOLLOWED)
def test_a_profile_is_followed_in_every_mode(mode: str, kind: str, space: str) -> None:
    image = colours().convert(mode)
    lossless = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}, "HEIF": {"quality": -1}}.get(kind, {})
    content = saved(image, kind, icc_profile=PROFILES[space], **lossless)
    plain = Image.open(io.BytesIO(content))
    assert plain.mode == mode
    native = plain.convert({"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[space])
    expected = srgb_of(native, PROFILES[space])
    assert np.abs(pixels(opened(content)) - expected).max() <= 1
    if mode != "1":  # black and white mean the same under any of them
        assert np.abs(np.asarray(plain.convert("RGB")).astype(int) - expected).max() > 15
    assert opened(content).warnings == ()


@pytest.mark.parametrize(
    ("mode", "kind", "space"),
    [
        ("RGBA", "PNG", "RGB"),
        ("RGBA", "WEBP", "RGB"),
        ("RGBA", "TIFF", "RGB"),
        ("LA", "PNG", "GRAY"),
        ("LA", "PNG", "RGB"),
    ],
)
def test_alpha_lies_on_the_white_of_srgb(mode: str, kind: str, space: str) -> None:
    """Colours first, then the white: the other way round edges would get another colour."""
    image = colours().convert(mode)
    image.putalpha(half_opaque())
    content = saved(image, kind, icc_profile=PROFILES[space], **({"lossless": True} if kind == "WEBP" else {}))
    native = image.convert(mode[:-1]).convert({"RGB": "RGB", "GRAY": "L"}[space])
    expected = on_white(srgb_of(native, PROFILES[space]), np.asarray(half_opaque()))
    got = pixels(opened(content))
    shown = np.asarray(half_opaque()) > 0  # where nothing shows, an encoder may change the colour
    assert np.abs(got - expected)[shown].max() <= 1.5
    assert (got[~shown] == 255).all()


def grey16(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint16))


LEVELS = np.array([[0, 128, 129, 257, 1000, 32767, 32896, 50000, 65535]])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
def test_16_bits_are_scaled(kind: str) -> None:
    got = pixels(opened(saved(grey16(LEVELS), kind)))
    assert np.abs(got[..., 0] - LEVELS / 257).max() <= 0.5


@pytest.mark.parametrize(
    ("header", "dtype", "white"),
    [(b"P5 4 1 65535\n", ">u2", 65535), (b"P5 4 1 1023\n", ">u2", 1023), (b"P5 4 1 255\n", ">u1", 255)],
)
def test_a_pgm_of_any_depth_is_scaled(header: bytes, dtype: str, white: int) -> None:
    levels = np.array([0, white // 3, white // 2, white])
    got = pixels(opened(header + levels.astype(dtype).tobytes()))
    assert np.abs(got[0, :, 0] - levels * 255 / white).max() <= 1


def test_a_16_bit_grey_profile_keeps_its_depth() -> None:
    """Dark tones of linear light: in 8 bits, 33 of these would be one."""
    linear = np.arange(0, 8192, 128)[None]
    got = pixels(opened(saved(grey16(linear), "PNG", icc_profile=PROFILES["GRAY"])))[..., 0]
    light = linear / 65535
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(got - expected).max() <= 1.5
    assert len(np.unique(got)) > 50


def tiff(bits: int, kind: int, data: bytes, byte_order: bytes = b"II") -> bytes:
    """A grey TIFF of one row and four columns; `kind` 1 is unsigned, 2 signed, 3 floating-point."""
    order = "<" if byte_order == b"II" else ">"
    entries = [
        *((256, 3, 4), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 1)),
        *((279, 4, len(data)), (339, 3, kind)),
    ]
    table = struct.pack(order + "H", len(entries))
    for tag, form, value in entries:
        packed = struct.pack(order + "H2x", value) if form == 3 else struct.pack(order + "I", value)
        table += struct.pack(order + "HHI", tag, form, 1) + packed
    magic = byte_order + struct.pack(order + "HI", 42, 8 + len(data))
    return magic + data + table + bytes(4)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(tiff(16, 1, struct.pack("<4H", 0, 257, 32896, 65535)), [0, 1, 128, 255], id="16 bits"),
        pytest.param(tiff(16, 1, struct.pack(">4H", 0, 257, 32896, 65535), b"MM"), [0, 1, 128, 255], id="big-endian"),
        pytest.param(tiff(12, 1, bytes.fromhex("000 555 aaa fff".replace(" ", ""))), [0, 85, 170, 255], id="12 bits"),
    ],
)
def test_a_deep_tiff_is_scaled_by_its_depth(content: bytes, expected: list[int]) -> None:
    assert pixels(opened(content))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        pytest.param(tiff(32, 3, struct.pack("<4f", 0, 0.5, 1, 200)), "floating-point", id="float"),
        pytest.param(tiff(32, 2, struct.pack("<4i", 0, 1, 255, 70000)), "32-bit", id="32 bits"),
        pytest.param(tiff(16, 2, struct.pack("<4h", -5, 1, 255, 7000)), "32-bit", id="16 bits with a sign"),
    ],
)
def test_numbers_without_a_white_are_refused(content: bytes, cause: str) -> None:
    with pytest.raises(InputError, match=rf"photo can't be used: its pixels are {cause} .* save it with 8 or 16 bits"):
        opened(content)


@pytest.mark.parametrize(
    ("image", "transparency"),
    [
        (Image.new("L", (4, 4), 7), 7),
        (Image.new("RGB", (4, 4), (7, 8, 9)), (7, 8, 9)),
        (colours().quantize(4), 2),
        (Image.fromarray(np.full((4, 4), 777, np.uint16)), 777),
    ],
    ids=["L", "RGB", "P", "16 bits"],
)
def test_a_transparent_colour_lies_on_white(image: Image.Image, transparency: object) -> None:
    content = saved(image, "PNG", transparency=transparency)
    see_through = (np.asarray(image).reshape(*image.size[::-1], -1) == np.array(transparency)).all(axis=-1)
    white = (pixels(opened(content)) == 255).all(axis=-1)
    assert see_through.any()
    assert np.array_equal(white, see_through)


def test_lab_is_its_own_space() -> None:
    lab = ImageCms.profileToProfile(
        colours(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    back = ImageCms.profileToProfile(
        lab, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert back is not None
    assert np.abs(pixels(opened(saved(lab, "TIFF"))) - np.asarray(back)).max() <= 1


@pytest.mark.parametrize(
    ("image", "options", "warning"),
    [
        (colours(), {"icc_profile": b"no profile at all"}, "its colour profile can't be followed"),
        (colours(), {"icc_profile": PROFILES["GRAY"]}, "one for GRAY, and the picture is RGB"),
        (colours(), {"icc_profile": PROFILES["CMYK"]}, "one for CMYK, and the picture is RGB"),
    ],
)
def test_a_profile_that_cant_be_followed_is_a_warning(image: Image.Image, options: Any, warning: str) -> None:
    decoded = opened(saved(image, "PNG", **options))
    assert warning in decoded.warnings[0]
    assert np.array_equal(pixels(decoded), np.asarray(image))


def test_a_gamma_without_a_profile_is_a_warning() -> None:
    plain = saved(colours(), "PNG")
    content = struct.pack(">I", 100_000)
    chunk = struct.pack(">I", 4) + b"gAMA" + content + struct.pack(">I", zlib.crc32(b"gAMA" + content))
    decoded = opened(plain[:33] + chunk + plain[33:])
    assert "gamma of 1" in decoded.warnings[0]


def test_adobe_rgb_by_its_exif_alone_is_a_warning() -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    decoded = opened(saved(colours(), "JPEG", exif=exif))
    assert "Adobe RGB" in decoded.warnings[0]
