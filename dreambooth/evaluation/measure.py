"""Compute every figure of an evaluation from embeddings of one subject's samples, for any bank.

figures = measure(bank=BankId(name=bank.name, hash=bank.hash), prompts=[PromptSamples(...), ...],
                  instance=bank.embed_images(photographs), class_samples=bank.embed_images(samples_of_class_prompt))
figures.figures["dino"].interval
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dreambooth.errors import InputError
from dreambooth.evaluation import metrics
from dreambooth.evaluation.bank import ImageEmbeddings
from dreambooth.evaluation.figures import (
    FIGURE_NAMES,
    BankId,
    Figure,
    Figures,
    NearestInstance,
    PromptRow,
    interval_of,
)
from dreambooth.evaluation.similarity import directions
from dreambooth.evaluation.verdict import warnings_of


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
    to_instance: Tensor | None = None  # (N, M) from samples to instance images; sharpens near_copies
    to_subject: Mapping[str, Tensor] = field(default_factory=dict)  # (N, M) masked patch similarity, by encoder
    background_leak: Sequence[float] | None = None  # of each sample that has a mask; left out: not measured


def measure(
    *,
    bank: BankId,
    prompts: Sequence[PromptSamples],
    instance: ImageEmbeddings,
    class_samples: ImageEmbeddings | None = None,
    instance_distances: Tensor | None = None,
    subject: ImageEmbeddings | None = None,
    further: Mapping[str, BankId] | None = None,
) -> Figures:
    """Every figure that the embeddings allow; `Figures.unmeasured` gives reasons for the others.

    `instance_distances` (M, M) between the instance images goes with `PromptSamples.to_instance`; `subject` are those
    images cut to the subject by their masks, all else white. `further` are the encoders beside the bank's that embedded
    samples and instance images, by name. Intervals are over prompts; those of pres and real_* over images
    (`figures.interval_of`).
    Raises InputError, naming the prompt, for no prompts, no samples, embeddings that aren't finite or of another width
    than the instance images'.
    """
    if not prompts:
        raise InputError("an evaluation needs at least one prompt with samples, got none")
    _check_all(prompts, instance, class_samples)
    copies = [
        metrics.near_copies(
            each.samples.clip, instance.clip, distances=each.to_instance, real_distances=instance_distances
        )
        for each in prompts
    ]
    rows = tuple(_row(place, prompts, instance, copied) for place, copied in enumerate(copies))
    if subject is not None:
        _check("the masked instance images", subject, instance)
    found = _values(rows, prompts, instance, class_samples, subject)
    measured_by = dict.fromkeys(found, bank)
    for encoder, identity in (further or {}).items():
        more = _further(encoder, prompts, instance)
        found |= more
        measured_by |= dict.fromkeys(more, identity)
    figures = {
        name: Figure(bank=measured_by[name], interval=interval_of(name, [numbers]), values=tuple(numbers))
        for name, numbers in found.items()
        if not isinstance(numbers, str)
    }
    return Figures(
        bank=bank,
        figures=figures,
        per_prompt=rows,
        nearest=tuple(_nearest(prompts, instance, copies)),
        warnings=warnings_of({name: figure.interval.mean for name, figure in figures.items()}),
        unmeasured={name: reason for name, reason in found.items() if isinstance(reason, str)},
    )


def _check_all(
    prompts: Sequence[PromptSamples], instance: ImageEmbeddings, class_samples: ImageEmbeddings | None
) -> None:
    if not len(instance):
        raise InputError("an evaluation needs at least one instance image, got none")
    _check("the instance images", instance, instance)
    if class_samples is not None:
        _check("samples of the class prompt", class_samples, instance)
    for of_prompt in prompts:
        whose, count = f"the prompt {of_prompt.prompt!r}", len(of_prompt.samples)
        if not count:
            raise InputError(f"there are no samples of {whose}; sample it before measuring")
        _check(f"samples of {whose}", of_prompt.samples, instance)
        if of_prompt.base is not None:
            _check(f"samples of {whose} by the base model", of_prompt.base, instance)
        for text in (of_prompt.text, of_prompt.text_no_identifier):
            _check_embeddings(f"the text of {whose}", text[None], instance.clip)
        if of_prompt.distances is not None and of_prompt.distances.shape != (count, count):
            raise InputError(
                f"{whose} has distances {tuple(of_prompt.distances.shape)} for {count} samples; "
                f"expected {(count, count)}"
            )


def _check(whose: str, embeddings: ImageEmbeddings, instance: ImageEmbeddings) -> None:
    _check_embeddings(f"{whose}, dino", embeddings.dino, instance.dino)
    _check_embeddings(f"{whose}, clip", embeddings.clip, instance.clip)
    for name, further in embeddings.further.items():
        _check_embeddings(f"{whose}, {name}", further, instance.further[name])


def _check_embeddings(whose: str, embeddings: Tensor, like: Tensor) -> None:
    """Raise InputError, naming `whose`, for embeddings that aren't finite or have another width than `like`."""
    try:
        directions(embeddings)
        metrics.check_width(embeddings, like)
    except ValueError as error:
        raise InputError(f"{whose}: {error}") from None


def _row(place: int, prompts: Sequence[PromptSamples], instance: ImageEmbeddings, copied: Tensor) -> PromptRow:
    own = prompts[place]
    samples, base, leaks = own.samples, own.base, own.background_leak
    return PromptRow(
        prompt=own.prompt,
        application=own.application,
        dino=float(metrics.fidelity(samples.dino, instance.dino).mean()),
        clip_i=float(metrics.fidelity(samples.clip, instance.clip).mean()),
        clip_t=metrics.clip_t(samples.clip, own.text),
        clip_t_no_identifier=metrics.clip_t(samples.clip, own.text_no_identifier),
        clip_t_base=None if base is None else metrics.clip_t(base.clip, own.text_no_identifier),
        followed=_followed(place, prompts),
        div=None if own.distances is None else metrics.div(own.distances),
        background_leak=sum(leaks) / len(leaks) if leaks else None,
        near_copies=float(copied.double().mean()),
    )


def _followed(place: int, prompts: Sequence[PromptSamples]) -> bool | None:
    """Whether a prompt is followed; None without the base model's samples of this prompt and others."""
    own = prompts[place]
    others = [
        each.base.clip
        for each in prompts
        if each.base and not torch.equal(each.text_no_identifier, own.text_no_identifier)
    ]
    if own.base is None or not others:
        return None
    return metrics.prompt_followed(own.samples.clip, own.base.clip, torch.cat(others), own.text_no_identifier)


def _nearest(
    prompts: Sequence[PromptSamples], instance: ImageEmbeddings, copies: Sequence[Tensor]
) -> Iterator[NearestInstance]:
    sample = 0
    for of_prompt, copied in zip(prompts, copies, strict=True):
        indices, similarities = metrics.nearest(of_prompt.samples.dino, instance.dino)
        for index, similarity, copy in zip(indices, similarities, copied, strict=True):
            yield NearestInstance(
                sample=sample,
                prompt=of_prompt.prompt,
                instance=int(index),
                similarity=float(similarity),
                near_copy=bool(copy),
            )
            sample += 1


def _values(
    rows: Sequence[PromptRow],
    prompts: Sequence[PromptSamples],
    instance: ImageEmbeddings,
    class_samples: ImageEmbeddings | None,
    subject: ImageEmbeddings | None,
) -> dict[str, list[float] | str]:
    """Values whose mean each figure is, or the reason why it is missing."""
    return {
        "dino": [row.dino for row in rows],
        "clip_i": [row.clip_i for row in rows],
        "dino_subject": "no masks of the instance images were given"
        if subject is None
        else [float(metrics.fidelity(each.samples.dino, subject.dino).mean()) for each in prompts],
        "dino_subject_patches": _subject_patches("dino", prompts),
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
        "prompts_followed": [float(row.followed) for row in rows if row.followed is not None]
        or "no samples by the base model were given that follow one of at least 2 prompts",
        "near_copies": [row.near_copies for row in rows],
        "nearest_dino": [float(metrics.nearest(each.samples.dino, instance.dino)[1].mean()) for each in prompts],
        "background_leak": [row.background_leak for row in rows if row.background_leak is not None]
        or "no masks of the subject were given",
    }


def _further(encoder: str, prompts: Sequence[PromptSamples], instance: ImageEmbeddings) -> dict[str, list[float] | str]:
    """Values as of `_values`, by an encoder beside the bank's."""
    real = instance.further[encoder]
    found: dict[str, list[float] | str] = {
        encoder: [float(metrics.fidelity(each.samples.further[encoder], real).mean()) for each in prompts],
        f"real_{encoder}": _among_themselves(real),
    }
    if (patches := f"{encoder}_subject_patches") in FIGURE_NAMES:
        found[patches] = _subject_patches(encoder, prompts)
    return found


def _subject_patches(encoder: str, prompts: Sequence[PromptSamples]) -> list[float] | str:
    """Each prompt's mean masked patch similarity by an encoder, or the reason for none."""
    similar = [each.to_subject[encoder] for each in prompts if encoder in each.to_subject]
    if len(similar) < len(prompts):
        return "no masks of the instance images were given"
    if not all(each.numel() for each in similar):
        return "no patch of an instance image is more than half the subject's"
    return [float(each.mean()) for each in similar]


def _among_themselves(real: Tensor) -> list[float] | str:
    """Mean similarity of each real image to the others, or the reason for none."""
    if len(real) < 2:
        return "one instance image has no other to be compared with"
    similarities = directions(real) @ directions(real).T
    others = similarities.masked_fill(torch.eye(len(real), dtype=torch.bool), 0)
    mean: list[float] = (others.sum(dim=1) / (len(real) - 1)).tolist()
    return mean


def _squared_deviations(fidelity: Sequence[float]) -> list[float] | str:
    """Values whose mean is the unbiased variance, or the reason for none."""
    count = len(fidelity)
    if count < 2:
        return "a variance over prompts needs at least 2 prompts"
    mean = sum(fidelity) / count
    return [(value - mean) ** 2 * count / (count - 1) for value in fidelity]
