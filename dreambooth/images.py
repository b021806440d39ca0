"""Instance images: found, opened, checked and cut into squares.

Can a photograph be trusted to be what its name says? No: phones rotate by a tag, scans are CMYK, drawings are
see-through, downloads stop halfway. So every image is opened and decoded before any work starts, all faults are told
at once, and what comes out is always upright opaque 8-bit RGB.
"""

import io
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import fsspec
import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from pydantic import TypeAdapter, ValidationError

from dreambooth.errors import InputError
from dreambooth.reach import prove_store
from dreambooth.subject import Words

if TYPE_CHECKING:
    import torch

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_FORMATS = ("JPEG", "PNG", "WEBP")
_EXPECTED = "expected a folder, a glob or a list of .jpg, .jpeg, .png or .webp images"


@dataclass(frozen=True, kw_only=True)
class InstanceImage:
    """One picture of the subject; `caption` (photo.txt beside photo.jpg) replaces its instance prompt."""

    address: str
    caption: str | None = None


def find_instance_images(addresses: Sequence[str]) -> tuple[InstanceImage, ...]:
    """All images at the given folders, globs and files, local or at any address that fsspec knows, with their captions.

    A folder gives the images that lie directly in it; other and hidden files are passed over. The result is sorted by
    file name, so that order depends neither on a file system nor on how the images were listed.
    Raises InputError for an address without images and for a caption that can't be read.
    """
    found = {image: caption for address in addresses for image, caption in _images_at(address)}
    ordered = sorted(found, key=lambda address: (address.rsplit("/", 1)[-1], address))
    return tuple(InstanceImage(address=address, caption=_read_caption(found[address])) for address in ordered)


def open_image(address: str, *, max_pixels: int) -> Image.Image:
    """Open and fully decode an image, see `decode_image`; InputError for what can't be read, too."""
    return decode_image(read_image(address), address, max_pixels=max_pixels)


def read_image(address: str) -> bytes:
    """The bytes of an image file; InputError, naming it and the cause, when it can't be read."""
    with _accessing(address):
        if address.startswith("/"):  # thousands of subjects have many files, and a disk's need no detour
            return Path(address).read_bytes()
        filesystem, path = fsspec.core.url_to_fs(address)
        content: bytes = filesystem.cat_file(path)
    return content


def decode_image(content: bytes, address: str, *, max_pixels: int) -> Image.Image:
    """Decode an image file as upright RGB; what is see-through lies on white.

    Raises InputError, naming the file and the cause, if it has more than `max_pixels` (told from its header, before
    anything is decoded), is empty, damaged or no JPEG, PNG or WebP.
    """
    try:
        with warnings.catch_warnings():
            # Ours is the limit that counts; Pillow's warning comes at a fixed size.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
            _check_pixels(image.size, address, max_pixels)
            image.load()
        return _to_rgb(_upright(image))
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{address} is refused by Pillow, before decoding: {error}; make it smaller") from None
    except UnidentifiedImageError:
        raise InputError(_unidentified(len(content), address)) from None
    except Exception as error:  # noqa: BLE001 - decoders raise whatever they trip over: OSError, SyntaxError, struct.error
        raise InputError(f"{address} is damaged: {error}; replace it or take it out of the images") from None


def squares(
    image: Image.Image,
    *,
    resolution: int,
    crop: Literal["center", "random"],
    crops_per_image: int,
    flip: bool,
    seed: int,
) -> list[Image.Image]:
    """Cut RGB squares of `resolution` pixels that are as large as the picture allows.

    "center" gives one; "random" gives `crops_per_image`, placed uniformly along the longer side and always the same for
    the same seed. `flip` adds the mirror image of each behind them.
    """
    side = min(image.size)
    slack = image.width - side, image.height - side
    if crop == "center":
        corners = [(slack[0] / 2, slack[1] / 2)]
    else:
        rng = random.Random(seed)
        corners = [(rng.random() * slack[0], rng.random() * slack[1]) for _ in range(crops_per_image)]
    # Cropping and scaling in one go never makes a large picture in between, whatever the aspect ratio.
    cut = [
        image.resize((resolution, resolution), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
        for left, top in corners
    ]
    return cut + [ImageOps.mirror(square) for square in cut] if flip else cut


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


@contextmanager
def _accessing(address: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"there is nothing at {address}; {_EXPECTED}") from None
    except Exception as error:  # noqa: BLE001 - every fsspec backend has exceptions of its own
        raise InputError(f"can't read {address}: {error}; {_EXPECTED} that this machine can read") from None


def _images_at(address: str) -> list[tuple[str, str | None]]:
    """Addresses of images, and of the captions beside them."""
    with _accessing(address):
        prove_store(address, what=f"can't read {address}")
        filesystem, path = fsspec.core.url_to_fs(address)
        # Some remember a listing for as long as the process lives; pictures may have been added since.
        filesystem.invalidate_cache()
        has_caption = filesystem.exists
        if filesystem.isdir(path):
            entries = [entry["name"] for entry in filesystem.ls(path, detail=True) if entry["type"] != "directory"]
            if not entries:
                raise InputError(f"the folder {address} holds no files; {_EXPECTED}")
            has_caption = set(entries).__contains__
        elif filesystem.exists(path):
            entries = [path]
        elif any(wildcard in path for wildcard in "*?["):
            entries = [entry for entry in filesystem.glob(path) if not filesystem.isdir(entry)]
            if not entries:
                raise InputError(f"no file matches {address}; {_EXPECTED}")
        else:
            raise FileNotFoundError(address)
        images = [
            (_full(filesystem, entry), _full(filesystem, caption) if has_caption(caption) else None)
            for entry in entries
            if _is_image_name(entry)
            for caption in [f"{entry.rpartition('.')[0]}.txt"]
        ]
    if not images:
        names = sorted(PurePosixPath(entry).name for entry in entries)
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise InputError(f"no image among the {len(names)} file(s) at {address} ({shown}); {_EXPECTED}")
    return images


def _is_image_name(path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _full(filesystem: Any, path: str) -> str:
    """An address that means the same in every process: absolute, with the protocol unless it is local."""
    return path if "file" in filesystem.protocol else str(filesystem.unstrip_protocol(path))


def _read_caption(address: str | None) -> str | None:
    if address is None:
        return None
    with _accessing(address):
        filesystem, path = fsspec.core.url_to_fs(address)
        content: bytes = filesystem.cat_file(path)
    try:
        return TypeAdapter(Words).validate_python(" ".join(content.decode("utf-8-sig").split()))
    except UnicodeDecodeError as error:
        raise InputError(f"the caption {address} is not UTF-8 text: {error}; save it as UTF-8 or remove it") from None
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"the caption {address}: {message}; write one, or remove it for the instance prompt") from None


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
        f"{address} is no JPEG, PNG or WebP, or its beginning is damaged ({size} bytes); "
        f"convert it or take it out of the images"
    )


def _upright(image: Image.Image) -> Image.Image:
    # A broken EXIF block says nothing about orientation, and the picture itself is sound.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would cut 16-bit grey off at 255 instead of scaling it.
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
    image = _to_srgb(image)
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_srgb(image: Image.Image) -> Image.Image:
    """Follow an embedded colour profile: in Display P3 (phones) or CMYK (print) the numbers mean other colours."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        converted = ImageCms.profileToProfile(
            image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode=mode
        )
    except (ImageCms.PyCMSError, OSError):
        return image  # a broken or foreign profile: take the numbers as they are, as most viewers do
    return image if converted is None else converted
