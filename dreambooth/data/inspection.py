"""Inspect every instance image before work starts: faults, warnings about the set, and its hash.

Each file is read and decoded once.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from PIL import Image

from dreambooth.config.text_files import utf8_fault
from dreambooth.data.images import InstanceImage, decode, open_image, read_image, search_images
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
    addresses: Sequence[str], *, resolution: int, max_pixels: int, trained: bool = True
) -> Inspection:
    """Find the images at folders, globs and files, and inspect them.

    Warnings include files beside them that aren't used.
    """
    found = search_images(addresses)
    inspection = inspect_images(found.images, resolution=resolution, max_pixels=max_pixels, trained=trained)
    return replace(inspection, warnings=found.warnings + inspection.warnings)


def inspect_images(
    images: Sequence[InstanceImage], *, resolution: int, max_pixels: int, trained: bool = True
) -> Inspection:
    """Read and decode every image. Raises one InputError for all faults: damage, too many or too few pixels.

    `resolution` is the side in pixels of the training squares: both sides of an image have to reach it. Images that are
    not `trained` on but only compared with may have any number and size.
    """
    digest = hashlib.sha256()
    faults, looks, remarks = [], [], []
    for instance_image in images:
        address = instance_image.address
        if (fault := utf8_fault(address)) is not None:
            faults.append(f"{fault}; rename the image or its folder")
            continue
        try:
            content = read_image(address)
            decoded = decode(content, address, max_pixels=max_pixels)
        except InputError as error:
            faults.append(str(error))
            continue
        image = decoded.image
        remarks += [f"{address} {warning}" for warning in decoded.warnings]
        if trained and min(image.size) < resolution:
            faults.append(
                f"{address} is {image.width} x {image.height} pixels, but images.resolution is {resolution}; "
                f"give a larger picture or lower images.resolution"
            )
        digest.update(_framed(content, instance_image.caption))
        looks.append(_Look(address=address, size=image.size, difference_hash=_difference_hash(image)))
    if faults:
        raise InputError("\n".join(faults))
    warnings = (*remarks, *(_about_the_set(looks) if trained else ()), *_alike(looks, max_pixels))
    return Inspection(images=tuple(images), data_hash=_short(digest), warnings=warnings)


def _framed(content: bytes, caption: str | None) -> bytes:
    """A file and its caption, each prefixed with its length, so that the concatenation is unambiguous."""
    parts = content, b"" if caption is None else b"caption " + caption.encode()
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
