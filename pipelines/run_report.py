"""One page for a run: what it came to, its samples beside the base model's, and how it was trained."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluated import Evaluated, read_pictures
from pipelines.report_evaluation import (
    addresses_of_grid,
    copies,
    figures_of_run,
    grid_of_run,
    nearest,
    prompts_of_run,
    sample_address,
    warnings_of,
)
from pipelines.report_page import facts, loss_curve, picture, render_page, section

_COPIES = 8
_INSTANCE_SIDE = 160  # pixels


def render_run(
    summary: Mapping[str, Any],
    described: Sequence[tuple[str, str]],
    history: Sequence[Mapping[str, float]],
    evaluated: Evaluated | None,
) -> str:
    """The page as HTML; everything that comes from data is escaped.

    `described` are (what, value) rows, `history` holds one mapping of metrics a step (step, loss, instance_loss,
    prior_loss, …).
    """
    title = f"{summary['subject']}: [V] = {summary['identifier']}, {summary['class_noun']}"
    curve = loss_curve(history)
    training = section("Training", f"<figure>{curve}</figure>" if curve else "")
    if evaluated is None:
        return render_page(title, facts(described), training)
    pairs = [pair for _, pair in nearest([evaluated], most=_COPIES)]
    wanted = [*evaluated.instance, *addresses_of_grid(evaluated, images=None)]
    pictures = read_pictures([*wanted, *(sample_address(evaluated, pair) for pair in pairs)])
    photographs = [
        picture(pictures[address], side=_INSTANCE_SIDE, alt=f"photograph {place}")
        for place, address in enumerate(evaluated.instance, start=1)
        if address in pictures
    ]
    figures = evaluated.figures
    return render_page(
        title,
        warnings_of([evaluated]),
        facts(described),
        section("Photographs", f'<div class="pictures">{"".join(photographs)}</div>' if photographs else ""),
        figures_of_run(figures) if figures else "",
        grid_of_run(evaluated, pictures),
        copies([evaluated], pictures, most=_COPIES),
        prompts_of_run(figures) if figures else "",
        training,
    )
