"""Sets of class images in storage: what is there, and the manifest of a whole one, made once and shared by subjects.

A set lies at <prior>/<key>; images are written one by one, the manifest last, and readers trust only that. An
unfinished or too small set is topped up; checking a whole one means reading its manifest.
"""

import hashlib
from dataclasses import asdict

from dreambooth.sampling.class_images import PriorPlan, image_name
from pipelines.storage.files import FileRecord, filesystem, join, read_bytes
from pipelines.storage.publications import Manifest, read_manifest, write_manifest
from pipelines.tasks import PriorSet


def images_present(parent_uri: str, plan: PriorPlan) -> set[str]:
    """Names of existing class images, in the manifest or not."""
    fs, path = filesystem(join(parent_uri, plan.key))
    try:
        return {name.rsplit("/", 1)[-1] for name in fs.ls(path, detail=False) if name.endswith(".png")}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def prior_set(parent_uri: str, plan: PriorPlan) -> PriorSet:
    """The set of a plan at its address, made or not."""
    return PriorSet(key=plan.key, uri=join(parent_uri, plan.key), class_prompt=plan.class_prompt, count=plan.count)


def is_whole(parent_uri: str, plan: PriorPlan) -> bool:
    """Whether a set's manifest lists all images wanted."""
    return len(_trusted(join(parent_uri, plan.key))) >= plan.count


def seal(parent_uri: str, plan: PriorPlan) -> None:
    """Write the manifest of a set with all its images."""
    uri, files = join(parent_uri, plan.key), {}
    for index in range(plan.count):
        content = read_bytes(join(uri, image_name(index)))
        files[image_name(index)] = FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    write_manifest(Manifest(uri=uri, files=_trusted(uri) | files, metadata=asdict(plan)))


def _trusted(uri: str) -> dict[str, FileRecord]:
    fs, path = filesystem(join(uri, "manifest.json"))
    return dict(read_manifest(uri).files) if fs.exists(path) else {}
