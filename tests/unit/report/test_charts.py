"""Charts of pages: smoothed, named, and of no more points than a screen shows."""

import pytest

from pipelines.report.by_step import chosen_steps
from pipelines.report.charts import Chart, loss_chart, losses_of_batch, running_mean, score_chart, scores_of_batch

HISTORY = [
    {"step": step, "loss": 1.0 + step % 2, "instance_loss": 0.5, "prior_loss": 0.1} for step in range(10, 2001, 10)
]


def chart(found: Chart | None) -> Chart:
    assert found is not None
    return found


def test_a_running_mean_is_truncated_at_the_ends() -> None:
    assert running_mean([1.0, 2.0, 6.0]) == pytest.approx([1.5, 3.0, 4.0])
    assert running_mean([]) == []


def test_losses_are_drawn_raw_and_smoothed() -> None:
    made = chart(loss_chart(HISTORY))
    assert [(line.label, line.faint) for line in made.lines][::3] == [("total, each step", True), ("total", False)]
    assert "2,000 steps" in made.title
    assert "mean squared error" in made.y_label
    assert 50 < len(made.x) <= 160
    assert made.x[-1] == 2000
    assert all(len(line.values) == len(made.x) for line in made.lines)
    without = chart(loss_chart([step | {"prior_loss": 0.0} for step in HISTORY]))
    assert "prior" not in [line.label for line in without.lines]
    assert loss_chart(HISTORY[:1]) is None


def test_subjects_share_a_chart_though_one_ended_early() -> None:
    made = chart(losses_of_batch({"rex": HISTORY, "mia": HISTORY[:50], "new": []}))
    rex, mia = made.lines
    assert (rex.label, mia.label) == ("rex", "mia")
    assert made.x[-1] == 2000
    assert None not in rex.values
    assert mia.values[-1] is None
    known = [value for value in mia.values if value is not None]
    assert 0.2 < len(known) / len(made.x) < 0.3
    assert losses_of_batch({"new": []}) is None


def test_scores_say_which_step_is_published() -> None:
    scores = [{"step": 50, "dino": 0.5, "clip_t": 0.3, "score": 0.8}, {"step": 100, "dino": 0.6, "clip_t": 0.3}]
    made = chart(score_chart(scores, 50))
    assert made.title == "Similarity over steps, measured 2 times; the model of step 50 is published"
    assert list(made.lines[0].values) == [0.5, 0.6]
    large = chart(score_chart(scores, 100, of="super-resolution stage"))
    assert large.title.startswith("Similarity over steps of the super-resolution stage, measured 2 times; the model of")
    assert score_chart([], 50) is None


def test_similarities_of_subjects_share_a_chart_though_measured_at_other_steps() -> None:
    scores = {"rex": [{"step": 50, "dino": 0.5}, {"step": 100, "dino": 0.6}], "mia": [{"step": 75, "dino": 0.4}]}
    made = chart(scores_of_batch(scores | {"new": []}))
    assert list(made.x) == [50, 75, 100]
    assert [(line.label, list(line.values)) for line in made.lines] == [
        ("rex", [0.5, None, 0.6]),
        ("mia", [None, 0.4, None]),
    ]
    assert scores_of_batch({"new": []}) is None


def test_of_many_steps_some_are_shown_with_the_last() -> None:
    found = {step: {0: f"{step}.png"} for step in range(10, 1001, 10)}
    chosen = list(chosen_steps(found))
    assert len(chosen) <= 12
    assert chosen[-1] == 1000
    assert chosen == sorted(chosen)
    assert chosen_steps({}) == {}
