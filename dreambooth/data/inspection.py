"""Inspect every instance image before work starts: faults, warnings about the set, and its hash.

Each file is read and decoded once.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from PIL import Image

from dreambooth.config.settings import ImagesConfig
from dreambooth.config.text_files import utf8_fault
from dreambooth.data.images import InstanceImage, decode, open_image, read_image, search_images
from dreambooth.data.images.masks import Mask, find_mask
from dreambooth.errors import InputError

_NEAR_BITS = 5
"""Most differing bits of 64 in the difference hashes of one photograph saved twice; others differ in about twenty."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Usable images, and `warnings` about the set.

    `data_hash` is the first 16 hex digits of the sha256 over files and captions in order, whatever their addresses.
    """

    images: tuple[InstanceImage, ...]
    data_hash: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Look:
    address: str
    size: tuple[int, int]
    difference_hash: np.ndarray

    @property
    def name(self) -> str:
        return self.address.rsplit("/", 1)[-1]


def inspect_addresses(
    addresses: Sequence[str],
    *,
    resolution: int,
    max_pixels: int,
    trained: bool = True,
    masked: ImagesConfig | None = None,
) -> Inspection:
    """Find the images at folders, globs and files, and inspect them; `masked` are the settings where masks are used.

    Warnings include files beside them that aren't used.
    """
    found = search_images(addresses, masks=masked is not None)
    inspection = inspect_images(
        found.images, resolution=resolution, max_pixels=max_pixels, trained=trained, masked=masked
    )
    return replace(inspection, warnings=found.warnings + inspection.warnings)


def inspect_images(
    images: Sequence[InstanceImage],
    *,
    resolution: int,
    max_pixels: int,
    trained: bool = True,
    masked: ImagesConfig | None = None,
) -> Inspection:
    """Read and decode every image. Raises one InputError for all faults: damage, too many or too few pixels, bad masks.

    `resolution` is the side in pixels of the training squares: both sides of an image have to reach it. Images that are
    not `trained` on but only compared with may have any number and size.
    """
    digest = hashlib.sha256()
    faults, looks, remarks, unmasked = [], [], [], []
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
        image = decoded.image
        remarks += [f"{address} {warning}" for warning in decoded.warnings]
        if mask is not None and masked is not None:
            remarks += [*mask.warnings, *_off_the_middle(address, mask, masked)]
        unmasked += [] if mask is not None else [address]
        if trained and min(image.size) < resolution:
            faults.append(
                f"{address} is {image.width} x {image.height} pixels, but images.resolution is {resolution}; "
                f"give a larger picture or lower images.resolution"
            )
        digest.update(_framed(content, instance_image.caption, mask))
        looks.append(_Look(address=address, size=image.size, difference_hash=_difference_hash(image)))
    if faults:
        raise InputError("\n".join(faults))
    if masked is not None:
        remarks += _without_masks(unmasked, len(images))
    warnings = (*remarks, *(_about_the_set(looks) if trained else ()), *_alike(looks, max_pixels))
    return Inspection(images=tuple(images), data_hash=_short(digest), warnings=warnings)


def _off_the_middle(address: str, mask: Mask, settings: ImagesConfig) -> Iterator[str]:
    """A warning about a subject that a square in the middle shows less than half of."""
    if settings.masks == "weight" and settings.crop == "center" and mask.in_the_middle < 0.5:
        yield (
            f"{address}: {mask.in_the_middle:.0%} of the subject lies in the square in the middle, which is trained "
            f"on; set images.masks to crop, or images.crop to random"
        )


def _without_masks(unmasked: Sequence[str], images: int) -> list[str]:
    """Warnings about images without a mask. Raises InputError if none has one."""
    if not unmasked:
        return []
    if len(unmasked) == images:
        raise InputError(
            f"images.masks needs masks, but none of the {images} photographs has photo.mask.png beside photo.jpg, a "
            f"picture of its name in a folder masks there, or an alpha channel; add them, or set images.masks to off"
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
        yield f"{len(looks)} instance images; the method is made for three to five of one subject"
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
