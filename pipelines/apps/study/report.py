"""Results of a study: shares of questions by the majority of their raters, as in the paper's table 2."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from scipy.stats import binomtest

from dreambooth.amounts import counted
from dreambooth.evaluation.bootstrap import LEVEL
from pipelines.apps.study.store import Answer
from pipelines.apps.study.study import ASPECTS, Aspect

CHOICES = ("a", "neither", "b")


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of `n` questions, with its 95 % interval by Wilson."""

    count: int
    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Answers about one aspect: shares of preferred pictures (a, b, neither), summing to one.

    `agreement` is the share of pairs of raters of a question with equal answers, None with one rater per question.
    """

    aspect: Aspect
    shares: dict[str, Share]
    agreement: float | None


def wilson(count: int, n: int) -> Share:
    """The share `count` of `n` with Wilson's score interval (1927): sound for few answers, and for none or all.

    >>> share = wilson(9, 10)
    >>> round(share.mean, 2), round(share.low, 2), round(share.high, 2)
    (0.9, 0.6, 0.98)
    """
    if not 0 <= count <= n or n == 0:
        raise ValueError(f"expected a count of 0 to n and n above 0, got {count} of {n}")
    ends = binomtest(count, n).proportion_ci(LEVEL, method="wilson")
    return Share(count=count, n=n, mean=count / n, low=float(ends.low), high=float(ends.high))


def majority(choices: Sequence[str]) -> str:
    """The choice of most raters of a question; "neither" for a tie.

    >>> majority(["a", "a", "b"]), majority(["a", "b"]), majority(["a", "b", "b", "neither"])
    ('a', 'neither', 'b')
    """
    counts = Counter(choices).most_common(2)
    if len(counts) == 2 and counts[0][1] == counts[1][1]:
        return "neither"
    return counts[0][0]


def preferences(answers: Sequence[Answer]) -> tuple[Preference, ...]:
    """Preferences by aspect over the answered questions; aspects without answers are left out."""
    found = []
    for aspect in ASPECTS:
        by_question: dict[int, list[str]] = defaultdict(list)
        for answer in answers:
            if answer.aspect == aspect:
                by_question[answer.question].append(answer.choice)
        if not by_question:
            continue
        counts = Counter(majority(choices) for choices in by_question.values())
        pairs = [one == other for choices in by_question.values() for one, other in combinations(choices, 2)]
        found.append(
            Preference(
                aspect=aspect,
                shares={choice: wilson(counts[choice], len(by_question)) for choice in CHOICES},
                agreement=sum(pairs) / len(pairs) if pairs else None,
            )
        )
    return tuple(found)


def describe_report(result: Mapping[str, Any]) -> list[str]:
    """A report as lines for a terminal."""
    raters = len(result["raters"])
    lines = [f"A: {result['a']}", f"B: {result['b']}"]
    lines.append(
        ", ".join(
            [counted(result["questions"], "question"), counted(raters, "rater"), counted(result["answers"], "answer")]
        )
    )
    if not result["preferences"]:
        return [*lines, "nobody has answered yet"]
    lines.append(f"{'':<18}{'A preferred':<20}{'cannot tell':<20}{'B preferred':<20}questions  raters agree")
    for aspect, preference in result["preferences"].items():
        shares = [preference["shares"][choice] for choice in CHOICES]
        cells = "".join(f"{_percent(share):<20}" for share in shares)
        agreement = "-" if preference["agreement"] is None else f"{preference['agreement']:.0%}"
        lines.append(f"{aspect + ' fidelity':<18}{cells}{shares[0]['n']:<11}{agreement}")
    return [*lines, "shares of questions by the majority of raters, with Wilson's 95 % intervals"]


def _percent(share: Mapping[str, float]) -> str:
    return f"{share['mean']:.0%} ({share['low']:.0%} to {share['high']:.0%})"


def report(about: Mapping[str, Any], answers: Sequence[Answer], questions: int) -> dict[str, Any]:
    """A study's result as plain data, for report.json."""
    return {
        "a": about["a"],
        "b": about["b"],
        "seed": about["seed"],
        "questions": questions,
        "raters": sorted({answer.rater for answer in answers}),
        "answers": len(answers),
        "interval": "Wilson, 95 %, over questions",
        "preferences": {preference.aspect: asdict(preference) for preference in preferences(answers)},
    }
