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

MOSTLY = 0.5
"""Share of a prompt's samples that nearly are another prompt's, from which on it isn't told apart from that."""

_NO_CLIP = "the bank has no CLIP"
_NO_TEXTS = "no text encoder read the prompts"


@dataclass(frozen=True, kw_only=True)
class PromptSamples:
    """The samples of one prompt, embedded by one bank."""

    prompt: str  # as sampled, with the identifier
    samples: ImageEmbeddings  # of the fine-tuned model, N images
    text: Tensor | None  # (D2,) of the prompt as sampled; None where no text encoder read it
    text_no_identifier: Tensor | None  # (D2,) of the prompt without the identifier
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
    base_class_samples: ImageEmbeddings | None = None,
    instance_distances: Tensor | None = None,
    sample_distances: Tensor | None = None,
    subject: ImageEmbeddings | None = None,
    further: Mapping[str, BankId] | None = None,
) -> Figures:
    """Every figure that the embeddings allow; `Figures.unmeasured` gives reasons for the others.

    `base_class_samples` are the base model's of the class prompt. `instance_distances` (M, M) between the instance
    images goes with `PromptSamples.to_instance`; `sample_distances` (S, S) between all samples, prompt after prompt,
    show which prompts differ where no text encoder says which are followed. `subject` are the instance images cut to
    the subject by their masks, all else white. `further` are the encoders beside the bank's that embedded samples and
    instance images, by name. Intervals are over prompts; those of pres, pres_base and real_* over images
    (`figures.interval_of`).
    Raises InputError, naming the prompt, for no prompts, no samples, embeddings that aren't finite or of another width
    than the instance images'.
    """
    if not prompts:
        raise InputError("an evaluation needs at least one prompt with samples, got none")
    _check_all(prompts, instance, class_samples, base_class_samples)
    copies = [
        metrics.near_copies(
            each.samples.scene, instance.scene, distances=each.to_instance, real_distances=instance_distances
        )
        for each in prompts
    ]
    rows = tuple(_row(place, prompts, instance, copied) for place, copied in enumerate(copies))
    if subject is not None:
        _check("the masked instance images", subject, instance)
    found = _values(rows, prompts, instance, subject)
    found |= _of_class(instance, pres=class_samples, pres_base=base_class_samples)
    found["prompts_apart"] = _apart(prompts, instance, instance_distances, sample_distances)
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
    prompts: Sequence[PromptSamples], instance: ImageEmbeddings, *class_samples: ImageEmbeddings | None
) -> None:
    if not len(instance):
        raise InputError("an evaluation needs at least one instance image, got none")
    _check("the instance images", instance, instance)
    for samples in class_samples:
        if samples is not None:
            _check("samples of the class prompt", samples, instance)
    for of_prompt in prompts:
        whose, count = f"the prompt {of_prompt.prompt!r}", len(of_prompt.samples)
        if not count:
            raise InputError(f"there are no samples of {whose}; sample it before measuring")
        _check(f"samples of {whose}", of_prompt.samples, instance)
        if of_prompt.base is not None:
            _check(f"samples of {whose} by the base model", of_prompt.base, instance)
        for text in (of_prompt.text, of_prompt.text_no_identifier):
            if text is not None and instance.clip is not None:
                _check_embeddings(f"the text of {whose}", text[None], instance.clip)
        if of_prompt.distances is not None and of_prompt.distances.shape != (count, count):
            raise InputError(
                f"{whose} has distances {tuple(of_prompt.distances.shape)} for {count} samples; "
                f"expected {(count, count)}"
            )


def _check(whose: str, embeddings: ImageEmbeddings, instance: ImageEmbeddings) -> None:
    _check_embeddings(f"{whose}, dino", embeddings.dino, instance.dino)
    if (embeddings.clip is None) != (instance.clip is None):
        raise InputError(f"{whose}: expected embeddings of one bank, and of these one has CLIP's and one has not")
    if embeddings.clip is not None and instance.clip is not None:
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
        clip_i=None
        if samples.clip is None or instance.clip is None
        else float(metrics.fidelity(samples.clip, instance.clip).mean()),
        clip_t=_clip_t(samples, own.text),
        clip_t_no_identifier=_clip_t(samples, own.text_no_identifier),
        clip_t_base=_clip_t(base, own.text_no_identifier),
        followed=_followed(place, prompts),
        div=None if own.distances is None else metrics.div(own.distances),
        background_leak=sum(leaks) / len(leaks) if leaks else None,
        near_copies=float(copied.double().mean()),
    )


def _clip_t(images: ImageEmbeddings | None, text: Tensor | None) -> float | None:
    return None if images is None or images.clip is None or text is None else metrics.clip_t(images.clip, text)


def _followed(place: int, prompts: Sequence[PromptSamples]) -> bool | None:
    """Whether a prompt is followed; None without its text or the base model's samples of this prompt and others."""
    own = prompts[place]
    samples, text = own.samples.clip, own.text_no_identifier
    base = None if own.base is None else own.base.clip
    if samples is None or base is None or text is None:
        return None
    others = [
        each.base.clip
        for each in prompts
        if each.base is not None
        and each.base.clip is not None
        and each.text_no_identifier is not None
        and not torch.equal(each.text_no_identifier, text)
    ]
    return metrics.prompt_followed(samples, base, torch.cat(others), text) if others else None


def _apart(
    prompts: Sequence[PromptSamples],
    instance: ImageEmbeddings,
    instance_distances: Tensor | None,
    sample_distances: Tensor | None,
) -> list[float] | str:
    """1 for each prompt whose samples mostly are none of another prompt's, 0 for the others; or the reason for none."""
    if sample_distances is None:
        return "no distances between samples of different prompts were given"
    if len(prompts) < 2:
        return "there is one prompt, and no other to compare it with"
    samples = torch.cat([each.samples.scene for each in prompts])
    counts = [len(each.samples) for each in prompts]
    of = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts))  # each sample's prompt
    scale = metrics.copy_scale(instance.scene, instance_distances)
    same = metrics.nearly_same(samples, samples, scale, distances=sample_distances) & (of[:, None] != of[None, :])
    return [float(rows.any(dim=1).double().mean() < MOSTLY) for rows in same.split(counts)]


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
    subject: ImageEmbeddings | None,
) -> dict[str, list[float] | str]:
    """Values whose mean each figure is, or the reason why it is missing."""
    unread = _NO_TEXTS if all(each.text_no_identifier is None for each in prompts) else ""
    return {
        "dino": [row.dino for row in rows],
        "clip_i": [row.clip_i for row in rows if row.clip_i is not None] or _NO_CLIP,
        "dino_subject": "no masks of the instance images were given"
        if subject is None
        else [float(metrics.fidelity(each.samples.dino, subject.dino).mean()) for each in prompts],
        "dino_subject_patches": _subject_patches("dino", prompts),
        "clip_t": [row.clip_t for row in rows if row.clip_t is not None] or _NO_TEXTS,
        "clip_t_no_identifier": [row.clip_t_no_identifier for row in rows if row.clip_t_no_identifier is not None]
        or _NO_TEXTS,
        "clip_t_base": [row.clip_t_base for row in rows if row.clip_t_base is not None]
        or (unread or "no samples by the base model were given"),
        "div": [row.div for row in rows if row.div is not None] or "no distances between samples were given",
        "real_dino": _among_themselves(instance.dino),
        "real_clip_i": _NO_CLIP if instance.clip is None else _among_themselves(instance.clip),
        "context_variance": _squared_deviations([row.dino for row in rows]),
        "prompts_followed": [float(row.followed) for row in rows if row.followed is not None]
        or (unread or "no samples by the base model were given that follow one of at least 2 prompts"),
        "near_copies": [row.near_copies for row in rows],
        "nearest_dino": [float(metrics.nearest(each.samples.dino, instance.dino)[1].mean()) for each in prompts],
        "background_leak": [row.background_leak for row in rows if row.background_leak is not None]
        or "no masks of the subject were given",
    }


def _of_class(instance: ImageEmbeddings, **samples: ImageEmbeddings | None) -> dict[str, list[float] | str]:
    """Similarities of samples of the class prompt to the instance images, or the reason for none."""
    return {
        name: "no samples of the class prompt were given"
        if of_model is None
        else metrics.fidelity(of_model.dino, instance.dino).tolist()
        for name, of_model in samples.items()
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
