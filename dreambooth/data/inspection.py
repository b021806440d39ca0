"""Inspect every instance image before work starts: faults, warnings about the set, and its hash.

Each file is read and decoded once.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from PIL import Image

from dreambooth.amounts import counted
from dreambooth.config.images import ImagesConfig
from dreambooth.config.text_files import utf8_fault
from dreambooth.data.buckets import region, size_for
from dreambooth.data.images import InstanceImage, Size, decode, open_image, read_image, search_images
from dreambooth.data.images.masks import Box, Mask, find_mask
from dreambooth.errors import InputError

_NEAR_BITS = 5
"""Most differing bits of 64 in the difference hashes of one photograph saved twice; others differ in about twenty."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Usable images, and `warnings` about the set.

    `data_hash` is the first 16 hex digits of the sha256 over files and captions in order, whatever their addresses.
    `sizes` has the size that each image is cut to for training.
    """

    images: tuple[InstanceImage, ...]
    data_hash: str
    warnings: tuple[str, ...]
    sizes: tuple[Size, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Look:
    address: str
    size: tuple[int, int]
    difference_hash: np.ndarray

    @property
    def name(self) -> str:
        return self.address.rsplit("/", 1)[-1]


Inspect = Callable[..., Inspection]
"""A function called as `inspect_addresses` or `inspect_images`, which may remember results."""


def inspect_addresses(
    addresses: Sequence[str],
    *,
    resolution: int,
    max_pixels: int,
    trained: bool = True,
    masked: ImagesConfig | None = None,
    buckets: Sequence[Size] = (),
    inspect: Inspect | None = None,
) -> Inspection:
    """Find the images at folders, globs and files, and inspect them; `masked` are the settings where masks are used.

    Warnings include files beside them that aren't used. `inspect` takes the place of `inspect_images`.
    """
    found = search_images(addresses, masks=masked is not None)
    inspection = (inspect or inspect_images)(
        found.images, resolution=resolution, max_pixels=max_pixels, trained=trained, masked=masked, buckets=buckets
    )
    return replace(inspection, warnings=found.warnings + inspection.warnings)


def inspect_images(
    images: Sequence[InstanceImage],
    *,
    resolution: int,
    max_pixels: int,
    trained: bool = True,
    masked: ImagesConfig | None = None,
    buckets: Sequence[Size] = (),
) -> Inspection:
    """Read and decode every image. Raises one InputError for all faults: damage, too many or too few pixels, bad masks.

    `resolution` is the side in pixels of the training squares: both sides of an image have to reach it, or those of the
    nearest of the sizes in `buckets`. Images that are not `trained` on but only compared with may have any number and
    size.
    """
    digest = hashlib.sha256()
    faults, looks, remarks, unmasked, cut_to = [], [], [], [], []
    sizes = buckets or ((resolution, resolution),)
    for instance_image in images:
        address = instance_image.address
        if (fault := utf8_fault(address)) is not None:
            faults.append(f"{fault}; rename the image or its folder")
            continue
        try:
            content = read_image(address)
            decoded = decode(content, address, max_pixels=max_pixels)
            mask = find_mask(instance_image, decoded, max_pixels=max_pixels) if masked else None
        except InputError as error:
            faults.append(str(error))
            continue
        image, box = decoded.image, region(decoded.image, mask, masked, resolution)
        size = size_for(box, sizes)
        remarks += [f"{address} {warning}" for warning in decoded.warnings]
        if mask is not None and masked is not None:
            remarks += [*mask.warnings, *_off_the_middle(address, mask, masked, size)]
        unmasked += [] if mask is not None else [address]
        if trained:
            faults += _too_small(address, image, box, size, resolution)
        cut_to.append(size)
        digest.update(_framed(content, instance_image.caption, mask))
        looks.append(_Look(address=address, size=image.size, difference_hash=_difference_hash(image)))
    if faults:
        raise InputError("\n".join(faults))
    if masked is not None:
        remarks += _without_masks(unmasked, len(images))
    warnings = (*remarks, *(_about_the_set(looks) if trained else ()), *_alike(looks, max_pixels))
    return Inspection(images=tuple(images), data_hash=_short(digest), warnings=warnings, sizes=tuple(cut_to))


def _too_small(address: str, image: Image.Image, box: Box, size: Size, resolution: int) -> Iterator[str]:
    """A fault of a picture that would have to be scaled up."""
    left, top, right, bottom = box
    if right - left >= size[1] and bottom - top >= size[0]:
        return
    asked = f"images.resolution is {resolution}"
    whole = box == (0, 0, *image.size)
    if size != (resolution, resolution) or not whole:
        used = "it is" if whole else f"{right - left} x {bottom - top} of it are"
        asked += f" and {used} cut to {size[1]} x {size[0]}"
    yield (
        f"{address} is {image.width} x {image.height} pixels, but {asked}; give a larger picture or lower "
        f"images.resolution"
    )


def _off_the_middle(address: str, mask: Mask, settings: ImagesConfig, size: Size) -> Iterator[str]:
    """A warning about a subject of which what is cut from the middle shows less than half."""
    if settings.masks != "weight" or settings.crop != "center":
        return
    if (share := mask.in_the_middle(size)) < 0.5:
        shape = "square" if size[0] == size[1] else "rectangle"
        yield (
            f"{address}: {share:.0%} of the subject lies in the {shape} in the middle, which is trained on; set "
            f"images.masks to crop, or images.crop to random"
        )


def _without_masks(unmasked: Sequence[str], images: int) -> list[str]:
    """Warnings about images without a mask. Raises InputError if none has one."""
    if not unmasked:
        return []
    if len(unmasked) == images:
        raise InputError(
            f"images.masks needs masks, but none of {counted(images, 'photograph')} has photo.mask.png beside "
            f"photo.jpg, a picture of its name in a folder masks there, or an alpha channel; add them, or set "
            f"images.masks to off"
        )
    shown = ", ".join(unmasked[:5]) + (f" and {len(unmasked) - 5} more" if len(unmasked) > 5 else "")
    return [f"{shown}: without a mask, so all of it counts as the subject"]


def _framed(content: bytes, caption: str | None, mask: Mask | None) -> bytes:
    """A file, its caption and a mask, each prefixed with its length, so that the concatenation is unambiguous."""
    parts = [content, b"" if caption is None else b"caption " + caption.encode()]
    parts += [] if mask is None else [b"mask " + mask.content]
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def _short(digest: "hashlib._Hash") -> str:
    return digest.hexdigest()[:16]


def _difference_hash(image: Image.Image) -> np.ndarray:
    """64 bits: whether each of 8 x 8 cells is brighter than its right neighbour."""
    small = image.convert("L").resize((9, 8), Image.Resampling.BILINEAR)
    grey = np.frombuffer(small.tobytes(), np.uint8).reshape(8, 9)
    bits: np.ndarray = grey[:, :-1] > grey[:, 1:]
    return bits


def _about_the_set(looks: Sequence[_Look]) -> Iterator[str]:
    if not 3 <= len(looks) <= 10:
        yield f"{counted(len(looks), 'instance image')}; the method is made for three to five of one subject"
    sizes = sorted({look.size for look in looks})
    if len(sizes) > 1:
        yield f"images of {len(sizes)} sizes, from {sizes[0][0]}x{sizes[0][1]} to {sizes[-1][0]}x{sizes[-1][1]}"


def _alike(looks: Sequence[_Look], max_pixels: int) -> Iterator[str]:
    for one, other in combinations(looks, 2):
        if int(np.count_nonzero(one.difference_hash != other.difference_hash)) <= _NEAR_BITS:
            # Pairs like this are rare, so looking again costs less than to keep all pictures, or hashes of them.
            pictures = [open_image(look.address, max_pixels=max_pixels).tobytes() for look in (one, other)]
            likeness = "the same" if pictures[0] == pictures[1] else "nearly the same"
            yield f"{one.name} and {other.name} are {likeness} picture"
