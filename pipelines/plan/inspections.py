"""Inspections of photographs, remembered with a batch: those of unchanged files are not made again.

To read and decode every photograph is most of the work of a plan, and the same command plans anew each time. What an
inspection found is stored under a key of all that it follows from: the files by address and state, captions, the
settings, the code and the libraries that decode. Faults are not stored: what was faulty is looked at again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dreambooth
from dreambooth.config.images import ImagesConfig
from dreambooth.config.settings import config_hash
from dreambooth.data.images import InstanceImage
from dreambooth.data.images.states import state_of
from dreambooth.data.inspection import Inspection, inspect_addresses, inspect_images
from dreambooth.reach import prove_store
from pipelines.storage.files import filesystem, join, write_bytes

Found = Mapping[str, Any]
"""What inspections found, as plain data, by their keys."""


class Inspections:
    """Inspects the images of one subject, unless `known` has it. `found` is what they had, made now or before."""

    def __init__(self, known: Found | None = None) -> None:
        self._known = known or {}
        self.found: dict[str, Any] = {}

    def __call__(self, addresses: Sequence[str], **settings: Any) -> Inspection:
        """Inspect the photographs, as `inspect_addresses` does."""
        return inspect_addresses(addresses, **settings, inspect=self._inspect)

    def _inspect(self, images: tuple[InstanceImage, ...], **settings: Any) -> Inspection:
        key = _key(images, settings)
        inspection = None if key is None else _known_one(self._known.get(key), images)
        if inspection is None:
            inspection = inspect_images(images, **settings)
        if key is not None:
            sizes = [list(size) for size in inspection.sizes]
            self.found[key] = [inspection.data_hash, list(inspection.warnings), sizes]
        return inspection


def known_inspections(root: str, batch: str) -> Mapping[str, Found]:
    """What the last plan of a batch found, by subject; nothing of a file that was cut short or is of another form.

    Nor of a store that doesn't answer at once: whether it can be used is checked elsewhere.
    """
    address = _address(root, batch)
    try:
        prove_store(address, what="no inspections")
        fs, path = filesystem(address, patient=False)
        stored = json.loads(fs.cat_file(path))
        return {name: dict(found) for name, found in stored.items()}
    except Exception:  # noqa: BLE001 - each driver raises its own, and without them all is inspected
        return {}


def remember_inspections(root: str, batch: str, found: Mapping[str, Found]) -> None:
    """Store what the plan of a batch found, by subject, instead of what was stored."""
    write_bytes(_address(root, batch), json.dumps(found, separators=(",", ":")).encode())


def _key(images: Sequence[InstanceImage], settings: Mapping[str, Any]) -> str | None:
    """Key of all that an inspection follows from; None if a file's state can't be known."""
    files: list[str] = []
    for image in images:
        for address in (image.address, *([] if image.mask is None else [image.mask])):
            if (state := state_of(address)) is None:
                return None
            files += [address, state]
    captions = [image.caption for image in images]
    return config_hash(json.dumps([files, captions, settings, _code()], default=_plain))


def _plain(settings: ImagesConfig) -> Any:
    return settings.model_dump(mode="json")


def _known_one(stored: Any, images: tuple[InstanceImage, ...]) -> Inspection | None:
    """An inspection as it was stored, or None where it wasn't."""
    match stored:
        case [str(data_hash), list(warnings), list(sizes)] if len(sizes) == len(images):
            with suppress(TypeError, ValueError):
                shapes = tuple((int(height), int(width)) for height, width in sizes)
                return Inspection(images=images, data_hash=data_hash, warnings=tuple(map(str, warnings)), sizes=shapes)
    return None


@cache
def _code() -> str:
    """Hash of the code and the libraries that inspect: other versions may find other faults."""
    sources = hashlib.sha256()
    for path in sorted((Path(dreambooth.__file__).parent / "data").glob("**/*.py")):
        sources.update(path.read_bytes())
    libraries = (f"{name} {version(name)}" for name in ("pillow", "pillow-heif", "numpy", "simplejpeg"))
    return " ".join([sources.hexdigest(), *libraries])


def _address(root: str, batch: str) -> str:
    return join(root, "batches", batch, "inspections.json")
