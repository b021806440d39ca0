"""Pictures of a study: samples of runs and batches, or new ones of a model."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from dreambooth.config.wording import IDENTIFIER_PLACEHOLDER
from dreambooth.data.images import open_image, png_bytes
from dreambooth.data.inspection import inspect_addresses
from dreambooth.errors import InputError
from pipelines.apps.generate import FoundModel, sample_prompts
from pipelines.apps.study.study import SubjectSamples
from pipelines.report.evaluated import Evaluated, find_evaluated, read_evaluation
from pipelines.storage.files import exists, join, read_json
from pipelines.storage.pictures import read_pictures

_LARGEST_PIXELS = 200_000_000


def has_samples(address: str) -> bool:
    """Whether an address is an evaluation.json, or the folder of a finished run or batch."""
    return address.endswith(".json") or (not address.startswith("models:") and exists(join(address, "summary.json")))


def read_samples(address: str) -> dict[str, SubjectSamples]:
    """The samples of an evaluation, a run or a batch, by subject.

    Raises InputError if there are none; failed subjects of a batch are skipped.
    """
    if address.endswith(".json"):
        if not exists(address):
            raise InputError(f"there is no evaluation at {address}")
        evaluated = read_evaluation(address)
        return {evaluated.subject: _samples(evaluated)}
    summary = read_json(join(address, "summary.json"))
    if "results" not in summary:
        found = {summary["subject"]: _of_run(address, summary)}
    else:
        rows = [row for row in summary["results"] if row["state"] == "done"]
        found = {row["subject"]: _of_run(row["uri"], read_json(join(row["uri"], "summary.json"))) for row in rows}
    kept = {name: samples for name, samples in found.items() if samples is not None}
    if not kept:
        raise InputError(
            f"{address} holds no samples of an evaluation (it was off, or an earlier version wrote this); "
            f"compare the models themselves: models:/NAME@latest, with --instance-images DIR"
        )
    return kept


def sample_model(
    model: FoundModel,
    prompts: Sequence[str],
    references: Sequence[bytes],
    *,
    images_per_prompt: int,
    seed: int,
    tracking_uri: str | None,
) -> SubjectSamples:
    """Sample every prompt with a model; equal prompts, number and seed give every model the same noise.

    Raises InputError for a model without metadata of its subject.
    """
    if not model.class_noun:
        raise InputError(f"{model.address} doesn't say what it draws; expected a model that this project published")
    asked = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    pictures = [
        png_bytes(image)
        for image in sample_prompts(model.address, asked, seed=seed, settings={}, tracking_uri=tracking_uri)
    ]
    by_prompt = (pictures[at : at + images_per_prompt] for at in range(0, len(pictures), images_per_prompt))
    return SubjectSamples(
        subject=model.subject,
        class_noun=model.class_noun,
        references=tuple(references),
        samples={prompt: tuple(images) for prompt, images in zip(prompts, by_prompt, strict=True)},
    )


def read_references(address: str, say: Callable[[str], None]) -> tuple[bytes, ...]:
    """Photographs at a folder, glob or address, as PNGs; `say` is called with warnings."""
    inspection = inspect_addresses([address], resolution=1, max_pixels=_LARGEST_PIXELS, trained=False)
    for warning in inspection.warnings:
        say(f"warning: {warning}")
    return tuple(png_bytes(open_image(image.address, max_pixels=_LARGEST_PIXELS)) for image in inspection.images)


def _of_run(uri: str, summary: dict[str, Any]) -> SubjectSamples | None:
    evaluated = find_evaluated(uri, summary)
    return None if evaluated is None else _samples(evaluated)


def _samples(evaluated: Evaluated) -> SubjectSamples:
    prompts = {_template(evaluated, of.prompt): of.fine_tuned for of in evaluated.prompts}
    named = {template: pictures for template, pictures in prompts.items() if IDENTIFIER_PLACEHOLDER in template}
    read = read_pictures([*evaluated.instance, *(address for pictures in named.values() for address in pictures)])
    references = tuple(read[address] for address in evaluated.instance if address in read)
    if not references:
        raise InputError(
            f"none of {evaluated.subject}'s photographs is at {', '.join(evaluated.instance)} any more; "
            f"compare the models themselves, with --instance-images DIR"
        )
    return SubjectSamples(
        subject=evaluated.subject,
        class_noun=evaluated.class_noun,
        references=references,
        samples={
            template: tuple(read[address] for address in pictures)
            for template, pictures in named.items()
            if all(address in read for address in pictures)
        },
    )


def _template(evaluated: Evaluated, prompt: str) -> str:
    """Replace the identifier of a prompt with [V]; a class prompt has none."""
    return re.sub(rf"(?<!\w){re.escape(evaluated.identifier)}(?!\w)", IDENTIFIER_PLACEHOLDER, prompt, count=1)
