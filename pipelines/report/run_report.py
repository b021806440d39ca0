"""One page for a run: the verdict, samples beside the base model's, figures, training curves, and files last."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreambooth.evaluation.verdict import worst_first
from dreambooth.models.cascade import SUPER_RESOLUTION
from pipelines.report.by_step import chosen_steps, find_pictures, samples_by_step
from pipelines.report.charts import loss_chart, score_chart
from pipelines.report.evaluated import Evaluated, warnings_in
from pipelines.report.pages import Cell, picture, render
from pipelines.report.report_evaluation import (
    addresses_of_grid,
    cards_of_run,
    copies,
    figures_of_run,
    nearest,
    prompts_of_run,
    sample_address,
)
from pipelines.report.verdicts import verdict_of_summary
from pipelines.storage.pictures import read_pictures

_COPIES = 8
_INSTANCE_SIDE = 160  # pixels


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """(what, value) rows about a run: its settings, its commands, its files; and the link to its batch's page."""

    settings: Sequence[tuple[str, str]] = ()
    commands: Sequence[tuple[str, str]] = ()
    places: Sequence[tuple[str, str]] = ()
    batch: Cell | None = None


def render_run(
    summary: Mapping[str, Any],
    facts: RunFacts,
    history: Sequence[Mapping[str, float]],
    evaluated: Evaluated | None,
    *,
    second: Sequence[Mapping[str, float]] = (),
    uri: str | None = None,
) -> str:
    """The page as HTML; data is escaped.

    `history` holds one mapping of metrics a step (step, loss, instance_loss, prior_loss, …), `second` those of a
    cascade's second stage; `uri` is the run's folder, where the pictures made during training are.
    """
    return render(
        "run.html",
        **_about(summary, facts),
        **_training(summary, history, uri),
        **_second_training(summary, second),
        **_evaluation(evaluated),
    )


def _about(summary: Mapping[str, Any], facts: RunFacts) -> Mapping[str, Any]:
    return {
        "title": f"{summary['subject']}: [V] = {summary['identifier']}, {summary['class_noun']}",
        "verdict": verdict_of_summary(summary),
        "warnings": worst_first(warnings_in(summary)),
        "facts": facts.settings,
        "commands": facts.commands,
        "places": facts.places,
        "batch": facts.batch,
    }


def _training(summary: Mapping[str, Any], history: Sequence[Mapping[str, float]], uri: str | None) -> Mapping[str, Any]:
    chosen = chosen_steps(find_pictures(uri, summary["key"])) if uri is not None else {}
    addresses = [address for numbers in chosen.values() for address in numbers.values()]
    return {
        "curve": loss_chart(history),
        "scores": score_chart(summary.get("scores", ()), summary.get("exported_step")),
        "by_step": samples_by_step(chosen, read_pictures(addresses)),
    }


def _second_training(summary: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> Mapping[str, Any]:
    second, of = summary.get(SUPER_RESOLUTION) or {}, "super-resolution stage"
    return {
        "second_curve": loss_chart(history, of=of),
        "second_scores": score_chart(second.get("scores", ()), second.get("exported_step"), of=of),
    }


def _evaluation(evaluated: Evaluated | None) -> Mapping[str, Any]:
    if evaluated is None:
        return dict.fromkeys(("photographs", "figures", "cards", "copies", "prompts"), ())
    pairs = [pair for _, pair in nearest([evaluated], most=_COPIES)]
    wanted = [*evaluated.instance, *addresses_of_grid(evaluated, images=None)]
    pictures = read_pictures([*wanted, *(sample_address(evaluated, pair) for pair in pairs)])
    figures = evaluated.figures
    return {
        "photographs": [
            picture(pictures[address], side=_INSTANCE_SIDE, alt=f"photograph {place}")
            for place, address in enumerate(evaluated.instance, start=1)
            if address in pictures
        ],
        "figures": figures_of_run(figures) if figures else [],
        "cards": cards_of_run(evaluated, pictures),
        "copies": copies([evaluated], pictures, most=_COPIES),
        "prompts": prompts_of_run(figures) if figures else None,
    }
