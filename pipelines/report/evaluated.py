"""Figures and picture addresses of one evaluated subject.

From the protocol's evaluation.json if there is one, else from the run's samples.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dreambooth.errors import InputError
from dreambooth.evaluation.figures import Figures, figures_from
from pipelines.stages.evaluation_store import INDEX
from pipelines.storage.files import filesystem, join, read_json
from pipelines.storage.publications import published


@dataclass(frozen=True, kw_only=True)
class PromptPictures:
    """Addresses of one prompt's pictures, by seed; `base` are the base model's, from the same noise."""

    prompt: str
    fine_tuned: tuple[str, ...]
    base: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One subject's evaluation; `instance` are addresses of its photographs, in the figures' order.

    `figures` is None if only samples were made.
    """

    subject: str
    class_noun: str
    identifier: str
    prompts: tuple[PromptPictures, ...]
    instance: tuple[str, ...]
    figures: Figures | None = None


def warnings_in(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Warnings about a run's model from its summary: the protocol's, else the short evaluation's.

    Both would repeat each other, and the protocol has more samples. Earlier versions' summaries lack the latter.
    """
    said = summary.get("evaluation") or summary.get("verdict") or {"warnings": ()}
    return tuple(said["warnings"])


def find_evaluated(run_uri: str, summary: Mapping[str, Any]) -> Evaluated | None:
    """The evaluation of a run that ended with a summary, or None."""
    stored = _stored(run_uri, summary["key"])
    if (measured := summary.get("evaluation")) is not None:
        evaluated = read_evaluation(measured["uri"])
        # Photographs as trained on, if stored: the originals may have changed.
        return dataclasses.replace(evaluated, instance=stored[1]) if stored else evaluated
    if stored is None:
        return None
    subject = {name: summary[name] for name in ("subject", "class_noun", "identifier")}
    return Evaluated(**subject, prompts=stored[0], instance=stored[1])


def read_evaluation(uri: str) -> Evaluated:
    """Read an evaluation.json. Raises InputError for any other file."""
    evaluation = read_json(uri)
    try:
        figures = figures_from(evaluation)
        return Evaluated(
            **{name: evaluation[name] for name in ("subject", "class_noun", "identifier")},
            prompts=tuple(
                PromptPictures(prompt=of["prompt"], fine_tuned=tuple(of["fine_tuned"]), base=tuple(of["base"]))
                for of in evaluation["pictures"]
            ),
            instance=tuple(evaluation["instance_images"]),
            figures=figures,
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{uri} isn't an evaluation that this version reads ({error!r}); evaluate again") from None


def read_pictures(addresses: Iterable[str]) -> dict[str, bytes]:
    """Pictures by their addresses, in parallel if the store allows; missing ones are left out."""
    found: dict[str, bytes] = {}
    wanted: dict[str, list[str]] = {}
    for address in dict.fromkeys(addresses):
        wanted.setdefault(address.partition("://")[0] if "://" in address else "", []).append(address)
    for group in wanted.values():
        fs = filesystem(group[0])[0]
        paths = {filesystem(address)[1]: address for address in group}
        found |= {paths[path]: content for path, content in fs.cat(list(paths), on_error="omit").items()}
    return found


def _stored(run_uri: str, key: str) -> tuple[tuple[PromptPictures, ...], tuple[str, ...]] | None:
    """A run's samples of its own prompts, and its photographs as cropped, or None."""
    manifest = published(join(run_uri, "evaluation"))
    if manifest is None or manifest.metadata.get("key") != key:
        return None
    index = read_json(join(manifest.uri, INDEX))
    addresses = {
        side: {prompt: tuple(join(manifest.uri, name) for name in names) for prompt, names in index[side].items()}
        for side in ("before", "after")
    }
    prompts = tuple(
        PromptPictures(prompt=prompt, fine_tuned=pictures, base=addresses["before"].get(prompt, ()))
        for prompt, pictures in addresses["after"].items()
    )
    return prompts, tuple(join(manifest.uri, name) for name in index["instance"])
