"""Charts of pages: losses and similarities over steps, of one subject or of many."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from dreambooth.amounts import counted

_POINTS = 160
_LOSSES = {"loss": "total", "instance_loss": "instance", "prior_loss": "prior"}
_SCORES = {"dino": "DINO: like the photographs", "clip_t": "CLIP-T: like the prompt"}
_STEP, _LOSS, _SIMILARITY = "step", "loss (mean squared error)", "cosine similarity"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart; `kind` is the class of its colour, a `faint` one lies under its smoothed one."""

    label: str
    values: Sequence[float | None]
    kind: str = ""
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over a common x-axis; those of `many` subjects are named by the pointer instead of a legend."""

    title: str
    y_label: str
    x: Sequence[float]
    lines: Sequence[Line]
    x_label: str = _STEP
    points: bool = False
    many: bool = False

    @property
    def plain(self) -> dict[str, Any]:
        """The chart's data, for the page's script."""
        lines = [{"label": one.label, "kind": one.kind, "faint": one.faint, "values": one.values} for one in self.lines]
        about = {"xLabel": self.x_label, "yLabel": self.y_label, "points": self.points, "many": self.many}
        return {"x": list(self.x), "series": lines, **about}


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of a fifteenth of the curve, truncated at the ends."""
    half = max(1, len(values) // 30)
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, at - half), min(len(values), at + half + 1)) for at in range(len(values))]
    return [(sums[last] - sums[first]) / (last - first) for first, last in ends]


def loss_chart(history: Sequence[Mapping[str, float]], *, of: str = "") -> Chart | None:
    """Losses over steps, each step's own (in intervals) under their running mean, since single steps are mostly noise.

    `of` names a cascade's second stage. None for fewer than two points.
    """
    if len(history) < 2:
        return None
    size = max(1, -(-len(history) // _POINTS))
    chunks = [range(start, min(start + size, len(history))) for start in range(0, len(history), size)]
    faint, smooth = [], []
    for key, label in _LOSSES.items():
        values = [step[key] for step in history]
        if key == "prior_loss" and not any(values):
            continue
        means = running_mean(values)
        own = [round(sum(values[at] for at in chunk) / len(chunk), 5) for chunk in chunks]
        faint.append(Line(label=f"{label}, each step", kind=label, values=own, faint=True))
        smooth.append(Line(label=label, kind=label, values=[round(means[chunk[-1]], 5) for chunk in chunks]))
    return Chart(
        title=f"Loss {of and f'of the {of} '}over {int(history[-1]['step']):,} steps: running means; "
        "faint, the steps' own",
        y_label=_LOSS,
        x=[int(history[chunk[-1]]["step"]) for chunk in chunks],
        lines=[*faint, *smooth],
    )


def score_chart(scores: Sequence[Mapping[str, float]], exported: int | None, *, of: str = "") -> Chart | None:
    """Similarities measured during training; `of` names a cascade's second stage. None without any."""
    if not scores:
        return None
    published = "" if exported is None else f"; the model of step {exported:,} is published"
    return Chart(
        title=f"Similarity over steps{of and f' of the {of}'}, measured {counted(len(scores), 'time')}{published}",
        y_label=_SIMILARITY,
        x=[int(one["step"]) for one in scores],
        lines=[
            Line(label=label, kind=kind, values=[round(one[key], 4) for one in scores])
            for (key, label), kind in zip(_SCORES.items(), ("instance", "prior"), strict=True)
        ],
        points=True,
    )


def losses_of_batch(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Chart | None:
    """The smoothed losses of subjects by name, in one chart; None without any."""
    smoothed = {
        name: ([step["step"] for step in history], running_mean([step["loss"] for step in history]))
        for name, history in histories.items()
        if len(history) > 1
    }
    if not smoothed:
        return None
    last = max(steps[-1] for steps, _ in smoothed.values())
    every = max(1, -(-int(last) // _POINTS))
    x = list(range(every, int(last) + every, every))
    x[-1] = int(last)
    lines = []
    for name, (steps, values) in smoothed.items():
        places = [bisect_right(steps, at) - 1 for at in x]
        ended = [at - every >= steps[-1] for at in x]
        known = [
            None if place < 0 or over else round(values[place], 5) for place, over in zip(places, ended, strict=True)
        ]
        lines.append(Line(label=name, values=known))
    return Chart(
        title=f"Running mean of the loss of {counted(len(lines), 'subject')}",
        y_label=_LOSS,
        x=x,
        lines=lines,
        many=True,
    )


def scores_of_batch(scores: Mapping[str, Sequence[Mapping[str, float]]]) -> Chart | None:
    """The similarities to the photographs of subjects by name, in one chart; None where none was measured."""
    measured = {name: {int(one["step"]): one["dino"] for one in found} for name, found in scores.items() if found}
    if not measured:
        return None
    x = sorted({step for found in measured.values() for step in found})
    return Chart(
        title=f"DINO similarity to the photographs, of {counted(len(measured), 'subject')}",
        y_label=_SIMILARITY,
        x=x,
        lines=[
            Line(label=name, values=[round(found[step], 4) if step in found else None for step in x])
            for name, found in measured.items()
        ],
        points=True,
        many=True,
    )
