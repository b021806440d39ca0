"""The time left of a batch, against a simulation in which it is known."""

import heapq
import io
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import rich.progress
from rich.console import Console
from rich.progress import TaskID

from pipelines.driver.console import RunConsole
from pipelines.driver.time_left import TimeLeft
from pipelines.tasks import STATES, Progress, State


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Subjects that go through lanes: seconds of loading, steps and pictures of each, all with some jitter."""

    subjects: int = 12
    lanes: int = 2
    loading: float = 6.0
    training: float = 120.0
    evaluation: float = 60.0
    jitter: float = 0.0
    done_before: int = 0
    resumed_at: float = 0.0  # the part of the first subjects' steps that an earlier attempt has made
    every: float = 2.0  # seconds between looks

    def ends(self) -> list[tuple[float, float, float, float, float]]:
        """(begins, trains, evaluates, ends, part of the steps that it begins with) of each subject."""
        rng = np.random.default_rng(0)
        free = [0.0] * self.lanes
        found = []
        for index in range(self.subjects - self.done_before):
            load, train, evaluate = (self.loading, self.training, self.evaluation) * rng.uniform(
                1 - self.jitter, 1 + self.jitter, 3
            )
            part = self.resumed_at if index < self.lanes else 0.0
            start = free[0]
            ready = start + load
            trained = ready + train * (1 - part)
            heapq.heapreplace(free, trained + evaluate)
            found.append((start, ready, trained, trained + evaluate, part))
        return found

    def curve(self) -> list[tuple[float, float | None, float]]:
        """(seconds, estimate, truth) of every look."""
        ends, estimate = self.ends(), TimeLeft(self.subjects)
        last = max(end for *_, end, _ in ends)
        curve = []
        for now in np.arange(0.0, last, self.every):
            counts: dict[State, int] = dict.fromkeys(STATES, 0)
            counts["done"] = self.done_before + sum(end <= now for *_, end, _ in ends)
            running = {}
            for index, (start, ready, trained, end, part) in enumerate(ends):
                if not start <= now < end:
                    continue
                counts["training"] += 1
                if now < ready:
                    continue
                step = int(400 * min(1.0, part + (1 - part) * (now - ready) / (trained - ready)))
                made = (int(56 * (now - trained) / (end - trained)), 56) if now >= trained and end > trained else None
                running[f"{index}"] = Progress(step=step, steps=400, images_per_second=4, loss=0.1, pictures=made)
            curve.append((float(now), estimate.update(float(now), counts, running, None), last - now))
        return curve


BATCHES = {
    "as it is": Batch(),
    "long pictures": Batch(training=60, evaluation=180),
    "no evaluation": Batch(evaluation=0.0),
    "many lanes": Batch(subjects=80, lanes=8),
    "an odd subject alone at the end": Batch(subjects=5),
    "one lane": Batch(subjects=4, lanes=1),
    "most were done before": Batch(subjects=100, done_before=92),
    "going on from checkpoints": Batch(resumed_at=0.75),
    "seldom looked at": Batch(every=15.0),
}


@pytest.mark.parametrize("name", BATCHES)
def test_at_a_constant_pace_it_is_right_and_never_rises_by_more_than_seconds(name: str) -> None:
    batch = BATCHES[name]
    curve = batch.curve()
    told = [(now, left, truth) for now, left, truth in curve if left is not None]
    assert told[0][0] <= batch.loading + batch.training + 0.2 * batch.evaluation + 2 * batch.every
    for now, left, truth in told:
        assert left == pytest.approx(truth, rel=0.15, abs=6 + batch.every), now
    rises = [after - before for (_, before, _), (_, after, _) in itertools.pairwise(told)]
    assert max(rises) < 5


def test_subjects_that_take_more_or_less_make_it_no_more_wrong_than_they_are() -> None:
    told = [(left, truth) for _, left, truth in Batch(subjects=24, lanes=4, jitter=0.2).curve() if left is not None]
    for left, truth in told:
        assert left == pytest.approx(truth, rel=0.2, abs=40)


def test_class_images_that_are_still_to_be_made_take_their_time_first() -> None:
    estimate = TimeLeft(4)
    counts: dict[State, int] = dict.fromkeys(STATES, 0) | {"training": 1, "waiting": 3}
    left: float | None = None
    for now in range(61):
        progress = Progress(step=now, steps=60, images_per_second=1, loss=0.1)
        if now == 60:
            counts |= {"done": 1, "training": 0}
        left = estimate.update(now, counts, {} if now == 60 else {"rex": progress}, (now, 100))
    assert left == pytest.approx(3 * 60 + 40, rel=0.05)


@pytest.mark.parametrize("began_with", [0, 200])
def test_a_runs_bar_goes_by_the_pace_of_this_run(monkeypatch: pytest.MonkeyPatch, began_with: int) -> None:
    """Two steps a second, and 35 seconds of scores in the middle; what a checkpoint had does not count."""
    now, out = [0.0], io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, get_time=lambda: now[0])
    monkeypatch.setattr("pipelines.driver.console.Console", lambda **settings: console)
    shown: list[tuple[float, float]] = []

    class Noted(rich.progress.Progress):
        def update(self, task_id: TaskID, **changes: Any) -> None:
            super().update(task_id, **changes)
            [task] = self.tasks
            if task.time_remaining is not None:
                shown.append((task.completed, task.time_remaining))

    monkeypatch.setattr("pipelines.driver.console.Progress", Noted)
    with RunConsole().bar("training") as update:
        for step in range(began_with + 1, 401):
            now[0] += 0.5 + (35 if step == 300 else 0)
            update(step, 400, "")
    steady = [(step, left) for step, left in shown if began_with + 20 <= step < 300]
    assert steady
    for step, left in steady:
        assert left == pytest.approx((400 - step) / 2, abs=1)
    for step, left in shown:
        assert left < 2 * (400 - step) / 2 + 1
