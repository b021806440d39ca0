"""Find instance images and captions at folders, globs and files, and report the files that aren't used."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dreambooth.amounts import counted
from dreambooth.data.images.access import EXPECTED, accessing
from dreambooth.data.images.captions import CaptionFiles, read_caption, the_caption
from dreambooth.data.images.mask_files import MaskFiles
from dreambooth.data.images.metadata import Metadata, read_metadata
from dreambooth.data.images.names import (
    MASKS_FOLDER,
    has_picture_name,
    is_caption_name,
    is_condition,
    is_mask_name,
    is_metadata_name,
    is_picture,
    is_system_file,
    masked_picture,
    may_be_picture,
    reason_not_used,
)
from dreambooth.data.images.place import Place, listing, look_at
from dreambooth.errors import InputError

_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class InstanceImage:
    """One photograph of the subject.

    `caption`, if it has one, replaces its instance prompt; `mask` is the address of its mask's file, if it has one.
    """

    address: str
    caption: str | None = None
    mask: str | None = None


@dataclass(frozen=True, kw_only=True)
class Search:
    """The images found, and a warning for each unused file that may have been meant."""

    images: tuple[InstanceImage, ...]
    warnings: tuple[str, ...]


def find_instance_images(addresses: Sequence[str], *, masks: bool = False) -> tuple[InstanceImage, ...]:
    """The images of `search_images`."""
    return search_images(addresses, masks=masks).images


def search_images(addresses: Sequence[str], *, masks: bool = False) -> Search:
    """All images and captions, and masks if asked for, at the given folders, globs and files, at any fsspec address.

    Images of a folder are those directly in it, recognized by name, or by their first bytes if the name has no known
    ending. Warnings name its other files, with the reason; hidden files are skipped. The result is sorted by file name,
    so that the order depends neither on the file system nor on the arguments.
    Raises InputError for an address without images, and for captions that can't be read or contradict each other.
    """
    images: dict[str, InstanceImage] = {}
    warnings: list[str] = []
    for address in addresses:
        place = look_at(address)
        found, remarks = _sort_out(place, masks=masks)
        if not found:
            raise InputError(_none_found(place))
        images |= {image.address: image for image in found}
        warnings += remarks
    ordered = sorted(images.values(), key=lambda image: (_name(image.address), image.address))
    return Search(images=tuple(ordered), warnings=tuple(dict.fromkeys(warnings)))


def _sort_out(place: Place, *, masks: bool) -> tuple[list[InstanceImage], list[str]]:
    """The images of a place, and warnings about other files."""
    pictures, unused = [], {}
    for path in place.files:
        if is_system_file(path):
            continue
        is_mask, reason = _is_mask(path, place, masks=masks)
        if reason is not None:
            unused[path] = reason
        elif is_mask:
            continue
        elif has_picture_name(path) or (may_be_picture(path) and is_picture(place.head(path))):
            pictures.append(path)
        elif not is_caption_name(path) and not is_metadata_name(path):
            unused[path] = reason_not_used(path)
    caption_files = CaptionFiles(place.beside)
    found = {path: caption_files.of(path) for path in pictures}
    unused |= {
        path: "it is the caption of no picture: that of photo.jpg is photo.txt"
        for path in place.files
        if is_caption_name(path) and not is_system_file(path) and path not in found.values() and path not in unused
    }
    metadata = read_metadata(place) if pictures else Metadata()
    unused |= {path: reason for path, reason in metadata.unused.items() if path in place.files}
    mask_files = MaskFiles(place, pictures) if masks else None
    if mask_files is not None:
        unused |= dict.fromkeys(
            mask_files.of_none(), "it is the mask of no picture: that of photo.jpg is photo.mask.png"
        )
        place = replace(place, folders=[path for path in place.folders if _name(path) != MASKS_FOLDER])
    remarks = [*_not_used(place, unused), *metadata.remarks, *_shared_captions(found), *_in_folders(place)]
    images = [
        InstanceImage(
            address=place.full(path),
            caption=_caption(place, path, file, metadata),
            mask=None if mask_files is None else mask_files.of(path),
        )
        for path, file in found.items()
    ]
    return images, remarks


def _is_mask(path: str, place: Place, *, masks: bool) -> tuple[bool, str | None]:
    """Whether a file is the mask of a picture, and the reason why it isn't used, if so."""
    if not masks:
        picture = masked_picture(path, place.files) if len(place.files) > 1 else None
        reason = None if picture is None else f"it looks like a mask of {_name(picture)}, and images.masks is off"
        return picture is not None, reason
    picture = masked_picture(path, place.beside)
    if picture is not None and is_condition(path):
        return False, f"it looks like a picture to condition {_name(picture)} on, which is not done"
    return picture is not None or is_mask_name(path), None


def _caption(place: Place, picture: str, file: str | None, metadata: Metadata) -> str | None:
    captions = [] if file is None else [read_caption(place.full(file))]
    captions += [metadata.captions[picture]] if picture in metadata.captions else []
    return the_caption(place.full(picture), captions)


def _not_used(place: Place, unused: dict[str, str]) -> Iterator[str]:
    for reason in dict.fromkeys(unused.values()):
        names = [_name(path) for path, other in unused.items() if other == reason]
        yield f"not used of {place.address}: {_listed(names)} ({reason})"


def _shared_captions(found: dict[str, str | None]) -> Iterator[str]:
    for caption in sorted({caption for caption in found.values() if caption is not None}):
        pictures = [_name(path) for path, other in found.items() if other == caption]
        if len(pictures) > 1:
            yield f"{_listed(pictures)} share the caption {_name(caption)}; {pictures[0]}.txt would be its own"


def _in_folders(place: Place) -> Iterator[str]:
    for folder, pictures in _pictures_in_folders(place):
        yield (
            f"not used of {place.address}: {_listed(pictures)} in its folder {_name(folder)} "
            f"(only pictures that lie directly in a folder are; give that folder, too)"
        )


def _pictures_in_folders(place: Place) -> Iterator[tuple[str, list[str]]]:
    for folder in place.folders:
        if is_system_file(folder):
            continue
        with accessing(place.full(folder)):
            pictures = [_name(path) for path in listing(place.filesystem, folder)[0] if has_picture_name(path)]
        if pictures:
            yield folder, pictures


def _none_found(place: Place) -> str:
    names = [_name(path) for path in place.files]
    inside = [f"{_name(folder)} ({len(pictures)})" for folder, pictures in _pictures_in_folders(place)]
    hint = f"; there are pictures in its folders {', '.join(inside)}: give one of them" if inside else ""
    return f"no image among {counted(len(names), 'file')} at {place.address} ({_listed(names, 3)}){hint}; {EXPECTED}"


def _listed(names: Sequence[str], shown: int = _SHOWN) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
