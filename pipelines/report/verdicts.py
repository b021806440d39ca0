"""One word about each subject's model and why, worst first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreambooth.evaluation.verdict import FAULTS, findings
from pipelines.report.evaluated import warnings_in

BOUND, UNMEASURED, FAILED = "bound", "not measured", "failed"
_UNFINISHED = "unfinished"
_ORDER = (FAILED, *(fault.name for fault in FAULTS), "doubtful", _UNFINISHED, UNMEASURED, BOUND)
_KINDS = {BOUND: "good", FAILED: "bad", _UNFINISHED: "", UNMEASURED: ""}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A word, why, and the cure for what is wrong; `rank` is lower for worse."""

    name: str
    why: str
    cure: str = ""

    @property
    def rank(self) -> int:
        """Place in the order of words, worst first."""
        return _ORDER.index(self.name)

    @property
    def kind(self) -> str:
        """The class of its colour."""
        return _KINDS.get(self.name, "doubt")


def verdict_of_result(
    warnings: Sequence[str],
    *,
    similarity: Mapping[str, float] | None,
    shares: Mapping[str, Any] | None,
    measured: bool,
) -> Verdict:
    """The verdict on a finished subject: `shares` are of its samples, `measured` whether any were."""
    if not measured:
        return Verdict(name=UNMEASURED, why="no figures say whether the samples are good")
    if not (found := findings(warnings)):
        return Verdict(name=BOUND, why=_why_bound(similarity, shares))
    worst = found[0]
    others = list(dict.fromkeys(each.name for each in found if each.name != worst.name))
    also = f"; also {' and '.join(others)}" if others else ""
    return Verdict(name=worst.name, why=f"{worst.measured}{also}", cure=worst.cure)


def verdict_of_summary(summary: Mapping[str, Any]) -> Verdict:
    """The verdict on a run from its summary."""
    return verdict_of_result(
        warnings_in(summary),
        similarity=summary.get("similarity"),
        shares=summary.get("verdict"),
        measured=bool(summary.get("verdict") or summary.get("evaluation")),
    )


def verdict_of_state(state: str, reason: str | None) -> Verdict:
    """The verdict on a subject without a result."""
    if state == "failed":
        return Verdict(name=FAILED, why=reason or "no reason is known")
    return Verdict(name=_UNFINISHED, why=f"{state} when this page was written")


def _why_bound(similarity: Mapping[str, float] | None, shares: Mapping[str, Any] | None) -> str:
    parts = []
    if similarity:
        parts.append(
            f"similarity {similarity['identifier']:.2f}, the photographs among themselves {similarity['instance']:.2f}"
        )
    if shares:
        parts.append(f"{shares['near_copies']:.0%} near-copies" if shares["near_copies"] else "no near-copies")
        if (followed := shares["prompts_followed"]) is not None:
            parts.append("all prompts followed" if followed == 1 else f"{followed:.0%} of prompts followed")
    return "; ".join(parts) or "no figure is outside its limit"
