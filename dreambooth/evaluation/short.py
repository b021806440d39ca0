"""The short evaluation that every run ends with: how alike samples and subject are, and what is wrong.

It takes few samples and the encoders at hand: a CLIP says which prompts are followed as the protocol does; without one,
pictures alone do. Limits and sentences are the protocol's (`metrics.py`, `verdict.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dreambooth.amounts import counted
from dreambooth.errors import InputError
from dreambooth.evaluation.metrics import copy_scale, nearly_same, prompt_followed
from dreambooth.evaluation.similarity import mean_pairwise_similarity, mean_self_similarity
from dreambooth.evaluation.verdict import ShortVerdict, Similarity, warnings_of

MOSTLY = 0.5
"""Share of a prompt's samples that nearly are another prompt's, from which on it isn't followed."""


@dataclass(frozen=True, kw_only=True)
class Glance:
    """A subject's pictures as encoders see them: S samples of P prompts, as many of each, and M instance images.

    `images` are the image encoder's embeddings (N, D1) of the sets `instance`, `samples`, `class_before` and
    `class_after`; `clip` are CLIP's (N, D2) of `instance`, `samples` and `base`, the base model's samples of the same
    prompts. Where there is a CLIP, `texts` (P, D2) are the prompts without the identifier, None if they are too long
    for it.
    """

    images: Mapping[str, Tensor]
    distances: Tensor  # (S + M, S + M), samples first
    clip: Mapping[str, Tensor] | None = None
    texts: Tensor | None = None


def similarity_of(images: Mapping[str, Tensor]) -> Similarity:
    """The similarities of a glance's `images`."""
    instance = images["instance"]
    return Similarity(
        identifier=mean_pairwise_similarity(images["samples"], instance),
        class_before=mean_pairwise_similarity(images["class_before"], instance),
        class_after=mean_pairwise_similarity(images["class_after"], instance),
        instance=mean_self_similarity(instance) if len(instance) > 1 else 1.0,
    )


def judge(seen: Glance, *, prompts: int) -> ShortVerdict:
    """Near-copies, prompts followed and warnings of samples of so many prompts; samples lie prompt after prompt.

    Raises InputError where samples can't be divided among the prompts.
    """
    scene = seen.images if seen.clip is None else seen.clip  # CLIP sees the place better
    samples, instance = scene["samples"], scene["instance"]
    count = len(samples)
    if not prompts or count % prompts:
        raise InputError(f"expected as many samples of each of {counted(prompts, 'prompt')}, got {count} in all")
    scale = copy_scale(instance, seen.distances[count:, count:])
    copied = nearly_same(samples, instance, scale, distances=seen.distances[:count, count:]).any(dim=1)
    of = torch.arange(count) // (count // prompts)  # each sample's prompt
    same = nearly_same(samples, samples, scale, distances=seen.distances[:count, :count])
    followed, by = _by_text(seen, prompts), "text"
    if followed is None:
        followed, by = _by_pictures(same & (of[:, None] != of[None, :]), prompts), "pictures"
    similarity = similarity_of(seen.images)
    means = {
        "near_copies": float(copied.double().mean()),
        "dino": similarity.identifier,
        "pres": similarity.class_after,
    }
    if len(instance) > 1:
        means["real_dino"] = similarity.instance
    if followed is not None:
        means["prompts_followed" if by == "text" else "prompts_apart"] = followed
    return ShortVerdict(
        near_copies=means["near_copies"],
        prompts_followed=followed,
        prompts_by=None if followed is None else by,  # type: ignore[arg-type]
        warnings=warnings_of(means),
    )


def _by_text(seen: Glance, prompts: int) -> float | None:
    """Share of prompts followed at least half as closely as by the base model, of those that it follows itself."""
    if seen.clip is None or seen.texts is None:
        return None
    after, before = (seen.clip[name].chunk(prompts) for name in ("samples", "base"))
    followed = []
    for place, text in enumerate(seen.texts):
        others = [base for base, other in zip(before, seen.texts, strict=True) if not torch.equal(other, text)]
        if others:
            followed.append(prompt_followed(after[place], before[place], torch.cat(others), text))
    measured = [each for each in followed if each is not None]
    return sum(measured) / len(measured) if measured else None


def _by_pictures(same: Tensor, prompts: int) -> float | None:
    """Share of prompts whose samples mostly are none of another prompt's, from (S, S) bool."""
    if prompts < 2:
        return None
    shares = [float(rows.any(dim=1).double().mean()) for rows in same.chunk(prompts)]
    return sum(share < MOSTLY for share in shares) / prompts
