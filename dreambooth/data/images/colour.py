"""Convert any mode that Pillow opens to opaque 8-bit sRGB, by the embedded colour profile.

In Display P3 (phones), Adobe RGB (cameras), CMYK (print) or a grey gamma, the same numbers mean other colours.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

from dreambooth.data.images.errors import Undefined

_SRGB_GAMMA = 1 / 2.2
_DEPTH_TAG, _INTEROPERABILITY_IFD = 258, 0xA005


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """Colours in a mode ImageCms accepts (L, I;16, RGB, CMYK or LAB), and their opacity (L), if it varies."""

    colours: Image.Image
    alpha: Image.Image | None


def to_srgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None, list[str]]:
    """The picture in sRGB on a white background, its alpha channel (L), and remarks on colours that can't be converted.

    Colours are converted before blending: the white is sRGB's, and edges blend as in a browser.
    Raises `Undefined` for floating-point and 32-bit pixels.
    """
    layers = _layers(image)
    rgb, remarks = _follow_profile(layers.colours, image)
    if layers.alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), layers.alpha)
    return rgb, layers.alpha, remarks


def _layers(image: Image.Image) -> _Layers:
    if image.mode.startswith(("I", "F")):
        return _deep_grey(image)
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    alpha = None
    if image.has_transparency_data:
        _halve_transparent_colour(image)
        alpha = image.convert("RGBA").getchannel("A")
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return _Layers(colours=image, alpha=alpha)
    # Palettes, RGBX, RGBA, HSV and YCbCr are codings of RGB numbers; 1 and LA of grey ones.
    return _Layers(colours=image.convert("L" if image.mode in ("1", "LA") else "RGB"), alpha=alpha)


def _halve_transparent_colour(image: Image.Image) -> None:
    """Reduce a 16-bit PNG's transparent colour to 8 bits, as Pillow reduces its pixels."""
    colour = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(colour, tuple) and max(colour) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _deep_grey(image: Image.Image) -> _Layers:
    """16-bit grey (a TIFF's 12 bits and any PGM are scaled to it), which Pillow would clip at 255."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise Undefined(
            f"its pixels are {'floating-point' if image.mode == 'F' else '32-bit'} numbers, and which of them is white "
            f"is not said; save it with 8 or 16 bits"
        )
    grey = np.asarray(image).astype(np.uint16)
    see_through = image.info.get("transparency")
    alpha = None
    if isinstance(see_through, int):
        alpha = Image.fromarray(np.where(grey == see_through, 0, 255).astype(np.uint8))
    depth = getattr(image, "tag_v2", {}).get(_DEPTH_TAG, (16,))[0]
    if depth < 16:
        grey = (grey.astype(np.uint32) * 65535 // (2**depth - 1)).astype(np.uint16)
    return _Layers(colours=Image.fromarray(grey), alpha=alpha)


def _follow_profile(colours: Image.Image, image: Image.Image) -> tuple[Image.Image, list[str]]:
    content = image.info.get("icc_profile")
    if not content:
        return _plain_rgb(colours), _unprofiled(image)
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        colours, mode = _as_profile_wants(colours, profile.profile.xcolor_space.strip())
        # Its shortcut for curves is made for 8 bits: dark tones of linear light would be ten levels off.
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "I;16" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
        return ImageCms.applyTransform(colours, transform) or colours, []
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        # As most viewers do. The photograph is sound; only its colours may be a little off.
        return _plain_rgb(colours), [f"its colour profile can't be followed, so its numbers are taken as sRGB: {error}"]


def _as_profile_wants(colours: Image.Image, space: str) -> tuple[Image.Image, str]:
    """The picture in the profile's colour space; only grey is converted, to RGB of equal values."""
    accepted = {"GRAY": ("L", "I;16"), "RGB": ("RGB",), "CMYK": ("CMYK",), "Lab": ("LAB",)}.get(space, ())
    if colours.mode in accepted:
        return colours, colours.mode
    if space == "RGB" and colours.mode in ("L", "I;16"):
        return _plain_rgb(colours), "RGB"
    raise ValueError(f"it is one for {space}, and the picture is {colours.mode}")


def _plain_rgb(colours: Image.Image) -> Image.Image:
    """RGB without colour conversion."""
    if colours.mode == "I;16":
        grey = (np.asarray(colours).astype(np.uint32) + 128) // 257
        colours = Image.fromarray(grey.astype(np.uint8))
    return colours if colours.mode == "RGB" else colours.convert("RGB")


def _unprofiled(image: Image.Image) -> list[str]:
    """Remarks on other signs of a colour space besides sRGB: too unreliable to follow, but worth a look."""
    gamma = image.info.get("gamma")
    if gamma and "srgb" not in image.info and abs(gamma - _SRGB_GAMMA) > 0.02:
        return [f"has a gamma of {gamma:.3g} and no colour profile, so its numbers are taken as sRGB; embed a profile"]
    if image.getexif().get_ifd(_INTEROPERABILITY_IFD).get(1) == "R03":
        return ["was taken in Adobe RGB and embeds no profile, so its numbers are taken as sRGB; embed the profile"]
    return []
