"""Turn an evaluation's figures into warnings about the paper's failures, each with a cure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

MANY_NEAR_COPIES = 0.25
"""Share of near-copies: one in each row of four samples, the paper's number per prompt."""

FEW_PROMPTS_FOLLOWED = 0.75
"""Share of prompts that are followed at least half as closely as by the base model."""

CLASS_IS_SUBJECT = 0.75
"""PRES over DINO among the real images; in the paper 0.64 with prior preservation and 0.86 without (tables 1 and 3)."""

UNBOUND = 0.6
"""DINO over DINO among the real images; in the paper 0.86 for DreamBooth and 0.74 for Textual Inversion (table 1)."""


_LESS_LEARNED = "fewer steps (train.keep=best with evaluation.every finds how many) or more class images"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A failure of a model: its name in a table, and how the sentence about it begins."""

    name: str
    opening: str


UNLIKE = Fault(name="not bound", opening="the samples hardly look like the subject")
COPIES = Fault(name="copies", opening="samples copy the photographs")
IGNORED = Fault(name="prompt not followed", opening="prompts are not followed")
DRIFTED = Fault(name="class drifted", opening="the class became the subject")
TOO_ALIKE = Fault(name="too alike", opening="the samples look more like the photographs")
FAULTS = (UNLIKE, COPIES, IGNORED, DRIFTED, TOO_ALIKE)
"""Worst first."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A warning taken apart: the name of its fault, what was measured, and the cure."""

    name: str
    measured: str
    cure: str


def _rank(sentence: str) -> int:
    return next((place for place, fault in enumerate(FAULTS) if sentence.startswith(fault.opening)), len(FAULTS))


def worst_first(warnings: Sequence[str]) -> list[str]:
    """Warnings of `warnings_of`, the worst first."""
    return sorted(warnings, key=_rank)


def findings(warnings: Sequence[str]) -> list[Finding]:
    """Warnings of `warnings_of` taken apart, worst first; a sentence of another version is named "doubtful"."""
    found = []
    for sentence in worst_first(warnings):
        measured, _, cure = sentence.partition("): ")
        name = FAULTS[_rank(sentence)].name if _rank(sentence) < len(FAULTS) else "doubtful"
        found.append(Finding(name=name, measured=f"{measured})" if cure else measured, cure=cure))
    return found


def warnings_of(means: Mapping[str, float]) -> tuple[str, ...]:
    """Warnings from the measured figures; empty if all is well.

    `means` are named as in `figures.FIGURE_NAMES`; `prompts_apart`, the share of prompts whose samples aren't those of
    another prompt, stands in where no text encoder could say which are followed.
    """
    sentences = []
    dino, real = means["dino"], means.get("real_dino", 0.0)  # unknown for one photograph
    if means["near_copies"] >= MANY_NEAR_COPIES:
        sentences.append(f"{COPIES.opening} ({means['near_copies']:.0%} are near-copies): {_LESS_LEARNED}")
    if real > 0 and round(dino, 2) > round(real, 2):
        sentences.append(
            f"{TOO_ALIKE.opening} ({dino:.2f}) than those look like each other ({real:.2f}): "
            f"not a better likeness, but pictures that vary less, as copies do; look at them beside the photographs, "
            f"and if places or poses are theirs, {_LESS_LEARNED}"
        )
    if means.get("prompts_followed", 1.0) < FEW_PROMPTS_FOLLOWED:
        sentences.append(
            f"{IGNORED.opening} ({1 - means['prompts_followed']:.0%} of them less than half as closely as by "
            f"the base model): a lower learning rate, {_LESS_LEARNED}"
        )
    if means.get("prompts_apart", 1.0) < FEW_PROMPTS_FOLLOWED:
        sentences.append(
            f"{IGNORED.opening} (samples of {1 - means['prompts_apart']:.0%} of them nearly are another "
            f"prompt's): a lower learning rate, {_LESS_LEARNED}"
        )
    if real > 0 and means.get("pres", -1.0) > CLASS_IS_SUBJECT * real:
        sentences.append(
            f"{DRIFTED.opening} (PRES {means['pres']:.2f}, the photographs among themselves {real:.2f}): "
            f"more class images or a higher prior_loss_weight"
        )
    if real > 0 and dino < UNBOUND * real:
        sentences.append(
            f"{UNLIKE.opening} (DINO {dino:.2f}, the photographs among themselves "
            f"{real:.2f}): more steps or a higher learning rate"
        )
    return tuple(sentences)


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Mean cosine similarities to the instance images, by the image encoder's embeddings (paper, section 4.2: DINO).

    identifier: samples of the prompts with the identifier, after; class_before and class_after: samples of the class
    prompt; instance: the instance images among themselves.
    """

    identifier: float
    class_before: float
    class_after: float
    instance: float


def similarity_of(means: Mapping[str, float]) -> Similarity:
    """The similarities among an evaluation's means; a single photograph is like itself."""
    return Similarity(
        identifier=means["dino"],
        class_before=means["pres_base"],
        class_after=means["pres"],
        instance=means.get("real_dino", 1.0),
    )


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of samples that copy a photograph, and of prompts that are followed.

    `prompts_by` is how it is known which prompts are followed: CLIP's `text`, or that `pictures` of different prompts
    differ. Both are None where neither could be measured, as of a single prompt.
    """

    near_copies: float
    prompts_followed: float | None
    prompts_by: Literal["text", "pictures"] | None


def shares_of(means: Mapping[str, float]) -> Shares:
    """The shares among an evaluation's means."""
    by: Literal["text", "pictures"] | None = None
    if (followed := means.get("prompts_followed")) is not None:
        by = "text"
    elif (followed := means.get("prompts_apart")) is not None:
        by = "pictures"
    return Shares(near_copies=means["near_copies"], prompts_followed=followed, prompts_by=by)
