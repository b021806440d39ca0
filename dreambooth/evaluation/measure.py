"""From embeddings of one subject's samples to every figure of its evaluation: pure, and the same for every bank.

figures = measure(bank=BankId(name=bank.name, hash=bank.hash), prompts=[PromptSamples(...), ...],
                  instance=bank.embed_images(photographs), class_samples=bank.embed_images(samples_of_class_prompt))
figures.figures["dino"].interval
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreambooth.errors import InputError
from dreambooth.evaluation import metrics
from dreambooth.evaluation.banks import ImageEmbeddings
from dreambooth.evaluation.bootstrap import SEED, bootstrap_mean
from dreambooth.evaluation.figures import BankId, Figure, Figures, NearestInstance, PromptRow
from dreambooth.evaluation.similarity import directions
from dreambooth.evaluation.warnings_in_words import warnings_of

NEAR_COPY = 0.97
"""A sample is a near-copy of an instance image that both encoders find it at least this similar to."""


@dataclass(frozen=True, kw_only=True)
class PromptSamples:
    """The samples of one prompt, embedded by one bank."""

    prompt: str  # as sampled, with the identifier
    samples: ImageEmbeddings  # of the fine-tuned model, N images
    text: Tensor  # (D2,) of the prompt as sampled
    text_no_identifier: Tensor  # (D2,) of the prompt without the identifier
    application: str = ""
    base: ImageEmbeddings | None = None  # of the base model, sampled from the prompt without the identifier
    distances: Tensor | None = None  # (N, N) between the samples; left out: no DIV
    background_leak: Sequence[float] | None = None  # of each sample that has a mask; left out: not measured


def measure(
    *,
    bank: BankId,
    prompts: Sequence[PromptSamples],
    instance: ImageEmbeddings,
    class_samples: ImageEmbeddings | None = None,
    seed: int = SEED,
) -> Figures:
    """Every figure that the given embeddings allow; `Figures.unmeasured` says of the others why they are missing.

    Intervals are bootstrapped over prompts; those of pres and near_copies, nearest_dino and real_* over images.
    Raises InputError, naming the prompt, for no prompts, no samples, embeddings that aren't finite or of another width
    than the instance images'.
    """
    if not prompts:
        raise InputError("an evaluation needs at least one prompt with samples, got none")
    _check_all(prompts, instance, class_samples)
    rows = tuple(_row(of_prompt, instance) for of_prompt in prompts)
    pairs = tuple(_nearest(prompts, instance))
    values, unmeasured = _values(rows, pairs, instance, class_samples)
    figures = {
        name: Figure(bank=bank, interval=bootstrap_mean([numbers], seed=seed), values=tuple(numbers))
        for name, numbers in values.items()
    }
    intervals = {name: figure.interval for name, figure in figures.items()}
    return Figures(
        bank=bank,
        figures=figures,
        per_prompt=rows,
        nearest=pairs,
        warnings=warnings_of(intervals, rows),
        unmeasured=unmeasured,
    )


def _check_all(
    prompts: Sequence[PromptSamples], instance: ImageEmbeddings, class_samples: ImageEmbeddings | None
) -> None:
    if not len(instance):
        raise InputError("an evaluation needs at least one instance image, got none")
    named = [("the class prompt", class_samples)]
    for of_prompt in prompts:
        if not len(of_prompt.samples):
            raise InputError(f"there are no samples of the prompt {of_prompt.prompt!r}; sample it before measuring")
        named += [
            (f"the prompt {of_prompt.prompt!r}", of_prompt.samples),
            (f"the prompt {of_prompt.prompt!r} by the base model", of_prompt.base),
        ]
    for whose, samples in named:
        for encoder in ("dino", "clip"):
            if samples is None:
                continue
            embeddings, real = getattr(samples, encoder), getattr(instance, encoder)
            try:
                directions(embeddings)
                metrics.check_width(embeddings, real)
            except ValueError as error:
                raise InputError(f"samples of {whose}, {encoder}: {error}") from None


def _row(of_prompt: PromptSamples, instance: ImageEmbeddings) -> PromptRow:
    samples, base, leaks = of_prompt.samples, of_prompt.base, of_prompt.background_leak
    copies = _near_copy(samples, instance)
    return PromptRow(
        prompt=of_prompt.prompt,
        application=of_prompt.application,
        dino=float(metrics.fidelity(samples.dino, instance.dino).mean()),
        clip_i=float(metrics.fidelity(samples.clip, instance.clip).mean()),
        clip_t=float(metrics.prompt_similarity(samples.clip, of_prompt.text).mean()),
        clip_t_no_identifier=float(metrics.prompt_similarity(samples.clip, of_prompt.text_no_identifier).mean()),
        clip_t_base=None
        if base is None
        else float(metrics.prompt_similarity(base.clip, of_prompt.text_no_identifier).mean()),
        div=None if of_prompt.distances is None else metrics.div(of_prompt.distances),
        background_leak=sum(leaks) / len(leaks) if leaks else None,
        near_copies=float(copies.double().mean()),
    )


def _near_copy(samples: ImageEmbeddings, instance: ImageEmbeddings) -> Tensor:
    """Which samples are near-copies of an instance image: (N,) bool."""
    dino = directions(samples.dino) @ directions(instance.dino).T
    clip = directions(samples.clip) @ directions(instance.clip).T
    return ((dino >= NEAR_COPY) & (clip >= NEAR_COPY)).any(dim=1)


def _nearest(prompts: Sequence[PromptSamples], instance: ImageEmbeddings) -> list[NearestInstance]:
    pairs: list[NearestInstance] = []
    for of_prompt in prompts:
        indices, similarities = metrics.nearest(of_prompt.samples.dino, instance.dino)
        copies = _near_copy(of_prompt.samples, instance)
        pairs += [
            NearestInstance(
                sample=len(pairs) + place,
                prompt=of_prompt.prompt,
                instance=int(index),
                similarity=float(similarity),
                near_copy=bool(copy),
            )
            for place, (index, similarity, copy) in enumerate(zip(indices, similarities, copies, strict=True))
        ]
    return pairs


def _values(
    rows: Sequence[PromptRow],
    pairs: Sequence[NearestInstance],
    instance: ImageEmbeddings,
    class_samples: ImageEmbeddings | None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The values that each figure is the mean of, and why others are missing."""
    found: dict[str, list[float] | str] = {
        "dino": [row.dino for row in rows],
        "clip_i": [row.clip_i for row in rows],
        "clip_t": [row.clip_t for row in rows],
        "clip_t_no_identifier": [row.clip_t_no_identifier for row in rows],
        "clip_t_base": [row.clip_t_base for row in rows if row.clip_t_base is not None]
        or "no samples by the base model were given",
        "pres": "no samples of the class prompt were given"
        if class_samples is None
        else metrics.fidelity(class_samples.dino, instance.dino).tolist(),
        "div": [row.div for row in rows if row.div is not None] or "no distances between samples were given",
        "real_dino": _among_themselves(instance.dino),
        "real_clip_i": _among_themselves(instance.clip),
        "context_variance": _squared_deviations([row.dino for row in rows]),
        "near_copies": [float(pair.near_copy) for pair in pairs],
        "nearest_dino": [pair.similarity for pair in pairs],
        "background_leak": [row.background_leak for row in rows if row.background_leak is not None]
        or "no masks of the subject were given",
    }
    values = {name: value for name, value in found.items() if not isinstance(value, str)}
    return values, {name: value for name, value in found.items() if isinstance(value, str)}


def _among_themselves(real: Tensor) -> list[float] | str:
    """Each real image's mean similarity to the others."""
    if len(real) < 2:
        return "one instance image has no other to be compared with"
    similarities = directions(real) @ directions(real).T
    others = similarities.masked_fill(torch.eye(len(real), dtype=torch.bool), 0)
    mean: list[float] = (others.sum(dim=1) / (len(real) - 1)).tolist()
    return mean


def _squared_deviations(fidelity: Sequence[float]) -> list[float] | str:
    """Values whose mean is the unbiased variance, so that it is bootstrapped like all other figures."""
    count = len(fidelity)
    if count < 2:
        return "a variance over prompts needs at least 2 prompts"
    mean = sum(fidelity) / count
    return [(value - mean) ** 2 * count / (count - 1) for value in fidelity]
