"""One page for a run: its result, samples beside the base model's, and training curves."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.report.evaluated import Evaluated, read_pictures
from pipelines.report.pages import loss_chart, picture, render
from pipelines.report.report_evaluation import (
    addresses_of_grid,
    cards_of_run,
    copies,
    figures_of_run,
    nearest,
    prompts_of_run,
    sample_address,
    warnings_of,
)

_COPIES = 8
_INSTANCE_SIDE = 160  # pixels


def render_run(
    summary: Mapping[str, Any],
    described: Sequence[tuple[str, str]],
    history: Sequence[Mapping[str, float]],
    evaluated: Evaluated | None,
) -> str:
    """The page as HTML; data is escaped.

    `described` are (what, value) rows, `history` holds one mapping of metrics a step (step, loss, instance_loss,
    prior_loss, …).
    """
    subject = {
        "title": f"{summary['subject']}: [V] = {summary['identifier']}, {summary['class_noun']}",
        "described": described,
        "curve": loss_chart(history),
    }
    return render("run.html", **subject, **(_NOTHING if evaluated is None else _evaluation(evaluated)))


_NOTHING: Mapping[str, Any] = dict.fromkeys(("warnings", "photographs", "figures", "cards", "copies", "prompts"), ())


def _evaluation(evaluated: Evaluated) -> Mapping[str, Any]:
    pairs = [pair for _, pair in nearest([evaluated], most=_COPIES)]
    wanted = [*evaluated.instance, *addresses_of_grid(evaluated, images=None)]
    pictures = read_pictures([*wanted, *(sample_address(evaluated, pair) for pair in pairs)])
    figures = evaluated.figures
    return {
        "warnings": warnings_of([evaluated]),
        "photographs": [
            picture(pictures[address], side=_INSTANCE_SIDE, alt=f"photograph {place}")
            for place, address in enumerate(evaluated.instance, start=1)
            if address in pictures
        ],
        "figures": [figures_of_run(figures)] if figures else [],
        "cards": cards_of_run(evaluated, pictures),
        "copies": copies([evaluated], pictures, most=_COPIES),
        "prompts": prompts_of_run(figures) if figures else None,
    }
