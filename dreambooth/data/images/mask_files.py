"""Masks by their pictures: photo.mask.png beside photo.jpg, or photo.png in a folder of masks there."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from dreambooth.data.images.access import accessing
from dreambooth.data.images.names import (
    MASKS_FOLDER,
    has_picture_name,
    is_condition,
    is_mask_name,
    masked_stem,
    stem_of,
)
from dreambooth.data.images.place import Place, listing
from dreambooth.errors import InputError


class MaskFiles:
    """The masks of a place's pictures."""

    def __init__(self, place: Place, pictures: Sequence[str]) -> None:
        self._place = place
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for path in sorted(place.beside):
            if (stem := masked_stem(path)) is not None and not is_condition(path):
                self._by_stem[stem].append(path)
        for parent in sorted({path.rpartition("/")[0] for path in pictures}):
            for path in self._in_folder(f"{parent}/{MASKS_FOLDER}"):
                self._by_stem[f"{parent}/{stem_of(path.rpartition('/')[2])}"].append(path)

    def _in_folder(self, folder: str) -> list[str]:
        filesystem = self._place.filesystem
        with accessing(self._place.full(folder)):
            files = listing(filesystem, folder)[0] if filesystem.isdir(folder) else []
        return [path for path in files if has_picture_name(path)]

    def of(self, picture: str) -> str | None:
        """The address of a picture's mask. Raises InputError if there are two."""
        found = [self._place.full(path) for path in self._by_stem.get(stem_of(picture), ())]
        if len(found) > 1:
            raise InputError(
                f"{self._place.full(picture)} has {len(found)} masks, {', '.join(found)}; leave one of them"
            )
        return found[0] if found else None

    def of_none(self) -> Iterator[str]:
        """Masks by name of no picture there: `….mask.png`, or in a folder of masks."""
        stems = {stem_of(path) for path in self._place.beside if has_picture_name(path)}
        for stem, paths in self._by_stem.items():
            if stem not in stems:
                yield from (path for path in paths if is_mask_name(path) or path not in self._place.beside)
