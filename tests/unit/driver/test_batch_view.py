"""What a person sees of a batch, with a terminal and without."""

import dataclasses
import io
import itertools

import pytest
from rich.console import Console

from pipelines.driver import batch_console
from pipelines.driver.batch_console import BatchView
from pipelines.driver.recent_rate import RecentRate
from pipelines.tasks import STATES, Progress, State


def counted(**counts: int) -> dict[State, int]:
    return {state: counts.get(state, 0) for state in STATES}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(batch_console.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_come_now_and_then_and_when_a_subject_is_finished(clock: list[float]) -> None:
    out = io.StringIO()
    running = {"rex": Progress(step=3, steps=9, images_per_second=4.0, loss=0.2)}
    with BatchView(total=4, console=Console(file=out)) as view:
        for second, done in enumerate([0, 0, 0, 1, 1, 2]):
            clock[0] = float(second)
            view.update(counted(done=done, training=1), running, class_images=(2, 8), failures=())
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert "0/4 done, 1 in training at 4.0 images/s, class images 2/8" in lines[0]
    assert lines[2].endswith("0:04 left")  # one subject took two seconds, and two are left


def test_every_rate_stands_beside_what_it_is_of(clock: list[float]) -> None:
    out = io.StringIO()
    running = {"rex": Progress(step=3, steps=9, images_per_second=4.0, loss=0.2)}
    with BatchView(total=4, console=Console(file=out, width=200)) as view:
        for second, made in ((0, 10), (20, 40)):
            clock[0] = float(second)
            view.update(counted(training=1), running, class_images=(made, 80), failures=())
    assert "1 in training at 4.0 images/s, class images 40/80 at 1.5 images/s" in out.getvalue().splitlines()[-1]


def test_class_images_have_the_rate_of_the_last_seconds() -> None:
    """Not that since the start, which loading the sampler and a slow first block lower for long."""
    rate = RecentRate()
    assert rate.update(0, 8) == 0  # those that were there
    assert rate.update(40, 16) == pytest.approx(8 / 40)
    for second in range(41, 100):
        rate.update(second, made := 16 + 8 * (second - 40))
    assert rate.update(99, made) == pytest.approx(8)
    assert rate.update(130, made) == pytest.approx(8)  # nothing new
    assert rate.update(131, 0) == 0  # another set


def test_blocks_that_end_together_are_no_burst() -> None:
    """Two actors make 8 images each in 30 seconds."""
    rate = RecentRate()
    for second, made in ((0.0, 0), (30.0, 8), (30.1, 16), (60.0, 24)):
        rate.update(second, made)
    assert rate.update(60.1, 32) == pytest.approx(16 / 30, rel=0.01)


def test_a_terminal_shows_a_table_that_stays_small() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, height=60)
    running = {f"subject-{i}": Progress(step=1, steps=2, images_per_second=1.0, loss=0.5) for i in range(256)}
    failures = [(f"bad-{i}", "ValueError: no") for i in range(50)]
    with BatchView(total=10_000, console=console) as view:
        view.update(counted(training=256, failed=50), running, class_images=None, failures=failures)
    shown = out.getvalue()
    assert "10,000 subjects" in shown
    assert "and 244 more" in shown
    assert "256.0" in shown
    assert sum(f"bad-{i}:" in shown for i in range(50)) == 5
    assert "bad-49" in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_a_subject_whose_samples_are_made_is_not_in_training(terminal: bool) -> None:
    out = io.StringIO()
    trained = Progress(step=9, steps=9, images_per_second=4.0, loss=0.2)
    running = {"rex": trained, "mug": dataclasses.replace(trained, pictures=(8, 56))}
    with BatchView(total=4, console=Console(file=out, force_terminal=terminal, width=100)) as view:
        view.update(counted(training=2), running, class_images=None, failures=())
    shown = out.getvalue()
    assert ("8/56" if terminal else "1 in training at 4.0 images/s, 1 in evaluation") in shown
    assert "8.0" not in shown


def test_quiet_prints_warnings_alone() -> None:
    out = io.StringIO()
    with BatchView(total=1, quiet=True, console=Console(file=out)) as view:
        for done in itertools.islice((0, 1), 2):
            view.update(counted(done=done), {}, class_images=None, failures=())
        view.line("nothing")
        view.warn("do this")
    assert out.getvalue() == "warning: do this\n"
