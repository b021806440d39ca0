"""Figures and picture addresses of one evaluated subject.

From the protocol's evaluation.json if there is one, else from that of the samples for the eye.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dreambooth.errors import InputError
from dreambooth.evaluation.figures import Figures, figures_from
from pipelines.storage.files import join, read_json
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

    The class prompt is the last of the prompts. `figures` is None if only samples were made.
    """

    subject: str
    class_noun: str
    identifier: str
    prompts: tuple[PromptPictures, ...]
    instance: tuple[str, ...]
    figures: Figures | None = None


def warnings_in(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Warnings about a run's model from its summary: the protocol's, else those of the samples for the eye.

    Both would repeat each other, and the protocol has more samples. Earlier versions' summaries lack the latter.
    """
    said = summary.get("evaluation") or summary.get("verdict") or {"warnings": ()}
    return tuple(said["warnings"])


def find_evaluated(run_uri: str, summary: Mapping[str, Any]) -> Evaluated | None:
    """The evaluation of a run that ended with a summary, or None."""
    if (measured := summary.get("evaluation") or summary.get("samples")) is not None:
        return read_evaluation(measured["uri"])
    return _of_earlier_version(run_uri, summary)


def read_evaluation(uri: str) -> Evaluated:
    """Read an evaluation.json. Raises InputError for any other file."""
    evaluation = read_json(uri)
    try:
        prompts = [(of["prompt"], of["fine_tuned"], of["base"]) for of in evaluation["pictures"]]
        # Earlier versions made no pictures of the class prompt by the base model, and kept no photographs.
        of_class = evaluation["class_prompt"], evaluation["class_pictures"], evaluation.get("base_class_pictures", ())
        return Evaluated(
            **{name: evaluation[name] for name in ("subject", "class_noun", "identifier")},
            prompts=tuple(
                PromptPictures(prompt=prompt, fine_tuned=tuple(tuned), base=tuple(base))
                for prompt, tuned, base in (*prompts, of_class)
            ),
            instance=tuple(evaluation.get("photographs", evaluation["instance_images"])),
            figures=figures_from(evaluation) if "figures" in evaluation else None,
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{uri} isn't an evaluation that this version reads ({error!r}); evaluate again") from None


def _of_earlier_version(run_uri: str, summary: Mapping[str, Any]) -> Evaluated | None:
    """A run's samples and photographs where earlier versions published them, or None."""
    manifest = published(join(run_uri, "evaluation"))
    if manifest is None or manifest.metadata.get("key") != summary["key"]:
        return None
    index = read_json(join(manifest.uri, "evaluation.json"))
    addresses = {
        side: {prompt: tuple(join(manifest.uri, name) for name in names) for prompt, names in index[side].items()}
        for side in ("before", "after")
    }
    return Evaluated(
        **{name: summary[name] for name in ("subject", "class_noun", "identifier")},
        prompts=tuple(
            PromptPictures(prompt=prompt, fine_tuned=pictures, base=addresses["before"].get(prompt, ()))
            for prompt, pictures in addresses["after"].items()
        ),
        instance=tuple(join(manifest.uri, name) for name in index["instance"]),
    )
