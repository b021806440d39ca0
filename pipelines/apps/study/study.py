"""A blind preference study (paper, section 4.2, table 2) of two models' pictures.

A question shows one picture of A and one of B, of the same subject and prompt, and is asked twice: which keeps the
subject better, and which follows the prompt better. Raters don't see which side is whose: sides are drawn when the
study is made, half one way and half the other, and every rater has their own order of questions.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from dreambooth.errors import InputError

Aspect = Literal["subject", "prompt"]
Side = Literal["left", "right", "neither"]
Choice = Literal["a", "b", "neither"]

ASPECTS: tuple[Aspect, ...] = get_args(Aspect)
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True, kw_only=True)
class SubjectSamples:
    """Pictures of one subject by one model: PNGs by prompt, and photographs to compare them with.

    In a prompt `[V]` stands for the identifier, since two models may have two.
    """

    subject: str
    class_noun: str
    references: tuple[bytes, ...]
    samples: Mapping[str, tuple[bytes, ...]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Two pictures of one subject and prompt; `left_is` is the source of the left one."""

    subject: str
    class_noun: str
    prompt: str
    references: tuple[bytes, ...]
    left: bytes
    right: bytes
    left_is: Literal["a", "b"]


def choice_of(left_is: str, side: Side) -> Choice:
    """The source of a side, where the left one is `left_is`.

    >>> choice_of("b", "left"), choice_of("b", "right"), choice_of("b", "neither")
    ('b', 'a', 'neither')
    """
    if side == "neither":
        return "neither"
    return "a" if (left_is == "a") == (side == "left") else "b"


def make_questions(
    a: Mapping[str, SubjectSamples], b: Mapping[str, SubjectSamples], *, count: int, seed: int
) -> tuple[Question, ...]:
    """Draw up to `count` questions from all pairs of pictures, balanced over subjects and prompts.

    `a` and `b` hold samples by subject. If each has a single subject, those two are compared whatever their names.
    Raises InputError if they have no subject or prompt in common, or equal pictures.
    """
    subjects = _in_common(a, b)
    draw = random.Random(f"{seed} pairs")
    pairs = _interleaved([_pairs(a[of_a], b[of_b], draw) for of_a, of_b in subjects])[:count]
    if not pairs:
        raise InputError("A and B show the same pictures; a study needs two models that differ")
    sides: list[Literal["a", "b"]] = ["a" if place % 2 else "b" for place in range(len(pairs))]
    random.Random(f"{seed} sides").shuffle(sides)
    return tuple(
        Question(
            subject=samples.subject,
            class_noun=samples.class_noun,
            prompt=prompt,
            references=samples.references,
            left=of_a if left_is == "a" else of_b,
            right=of_b if left_is == "a" else of_a,
            left_is=left_is,
        )
        for (samples, prompt, of_a, of_b), left_is in zip(pairs, sides, strict=True)
    )


def order_for(rater: str, numbers: Sequence[int], *, seed: int) -> list[int]:
    """A rater's order of questions: stable for each rater, different between raters."""
    order = list(numbers)
    random.Random(f"{seed} order {rater}").shuffle(order)
    return order


_Pair = tuple[SubjectSamples, str, bytes, bytes]


def _in_common(a: Mapping[str, SubjectSamples], b: Mapping[str, SubjectSamples]) -> list[tuple[str, str]]:
    shared = [(name, name) for name in sorted(a) if name in b]
    if not shared and len(a) == len(b) == 1:
        shared = [(next(iter(a)), next(iter(b)))]
    if not shared:
        raise InputError(
            f"A and B have no subject in common: A has {', '.join(sorted(a)) or 'none'}, "
            f"B has {', '.join(sorted(b)) or 'none'}"
        )
    for of_a, of_b in shared:
        if a[of_a].class_noun != b[of_b].class_noun:
            raise InputError(
                f"{of_a} is a {a[of_a].class_noun} in A and a {b[of_b].class_noun} in B; expected one class noun"
            )
        if not set(a[of_a].samples) & set(b[of_b].samples):
            raise InputError(
                f"A and B have no prompt of {of_a} in common: A has {len(a[of_a].samples)}, the first "
                f"{min(a[of_a].samples, default='-')!r}, B has {len(b[of_b].samples)}, the first "
                f"{min(b[of_b].samples, default='-')!r}"
            )
    return shared


def _pairs(a: SubjectSamples, b: SubjectSamples, draw: random.Random) -> list[_Pair]:
    """All differing pairs of a subject, cycling through its prompts."""
    prompts = [prompt for prompt in a.samples if prompt in b.samples]
    draw.shuffle(prompts)
    by_prompt = []
    for prompt in prompts:
        pairs = [
            (a, prompt, of_a, of_b)
            for of_a, of_b in zip(a.samples[prompt], b.samples[prompt], strict=False)
            if of_a != of_b
        ]
        draw.shuffle(pairs)
        by_prompt.append(pairs)
    return _interleaved(by_prompt)


def _interleaved(groups: Sequence[Sequence[_Pair]]) -> list[_Pair]:
    """The first of each group, then the second of each, and so on."""
    longest = max((len(group) for group in groups), default=0)
    return [group[place] for place in range(longest) for group in groups if place < len(group)]
