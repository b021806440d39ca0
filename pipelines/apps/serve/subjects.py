"""Find the registered models of a service."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dreambooth.errors import InputError
from pipelines.apps.generate import parse_address
from pipelines.tracking.client import check_connection, every, quietly
from pipelines.tracking.registry import RESULT_TAG


@dataclass(frozen=True, kw_only=True)
class ServedSubject:
    """A version of a registered model, at `address` `models:/NAME/VERSION`, and its metadata.

    Aliases are resolved once, when the service starts.
    """

    name: str
    address: str
    identifier: str
    class_noun: str
    base_model: str
    base_hash: str
    resolution: int | None  # of training in pixels, if known


def find_subjects(pattern: str, tracking_uri: str) -> tuple[ServedSubject, ...]:
    """Models matching `models:/NAME@ALIAS` or `models:/NAME/VERSION`, by name; NAME may hold `*`.

    Models without that alias or version are skipped. Raises InputError if none is left.
    """
    name, alias, version = parse_address(pattern, pattern=True)
    client = check_connection(tracking_uri)
    with quietly():
        models = every(client.search_registered_models)
        names = [model.name for model in models if fnmatch.fnmatchcase(model.name, name)]
        found = [_find(client, each, alias, version) for each in sorted(names)]
    subjects = _named([subject for subject in found if subject is not None])
    if not subjects:
        known = f"{len(names)} match its name" if names else "none has such a name; 'dreambooth models' lists them"
        raise InputError(f"no registered model is {pattern}: {known}")
    return subjects


def _find(client: MlflowClient, name: str, alias: str, version: str) -> ServedSubject | None:
    try:
        if version:
            found = client.get_model_version(name, version)
        else:
            found = client.get_model_version_by_alias(name, alias or "latest")
    except MlflowException:  # it has no such version, or no such alias
        return None
    tags = found.tags
    if RESULT_TAG not in tags:
        return None
    return ServedSubject(
        name=name,
        address=f"models:/{name}/{found.version}",
        identifier=tags["identifier"],
        class_noun=tags["class_noun"],
        base_model=tags.get("base_model", ""),
        base_hash=tags.get("base_hash", ""),
        resolution=int(resolution) if (resolution := tags.get("resolution", "")).isdigit() else None,
    )


def _named(subjects: Sequence[ServedSubject]) -> tuple[ServedSubject, ...]:
    """Subjects by their names in requests: without the prefix if that is unique."""
    short = [subject.name.removeprefix("dreambooth-") for subject in subjects]
    return tuple(
        replace(subject, name=name) if short.count(name) == 1 else subject
        for subject, name in zip(subjects, short, strict=True)
    )
