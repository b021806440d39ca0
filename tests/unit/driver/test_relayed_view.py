"""What a driver sends through its log is what somebody who follows the log sees."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from pipelines.driver import batch_console, relay
from pipelines.driver.console import RunConsole
from pipelines.driver.relay import RELAY_VARIABLE
from pipelines.driver.relayed_view import RelayedBatchView, Replay
from pipelines.tasks import STATES, Progress, State


def counted(**counts: int) -> dict[State, int]:
    return {state: counts.get(state, 0) for state in STATES}


def drive(view: batch_console.BatchView, clock: list[float]) -> None:
    """Ten seconds of a batch of four."""
    for second in range(10):
        clock[0] = float(second)
        running = {"rex": Progress(step=10 * second, steps=100, images_per_second=4.0, loss=0.25)}
        failed = [("mug", "ValueError: no")] if second > 7 else []
        counts = counted(done=second // 3, training=1, failed=len(failed))
        view.update(counts, running, class_images=(second, 9), failures=failed)
    view.line("rex: dreambooth-rex version 1")


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> str:
    clock = [0.0]
    with RelayedBatchView(total=4, clock=lambda: clock[0]) as view:
        drive(view, clock)
    return capsys.readouterr().err


@pytest.fixture
def shown_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], io.StringIO]:
    """Makes every view print to a terminal, or to what is none."""

    def show(terminal: bool) -> io.StringIO:
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=100, height=40)
        monkeypatch.setattr(batch_console, "Console", lambda **settings: console)
        return out

    return show


def replay(log: str, piece: int) -> list[str]:
    lines: list[str] = []
    with Replay(lines.append) as followed:
        for start in range(0, len(log), piece):
            followed.feed(log[start : start + piece])
    return lines


@pytest.mark.parametrize("piece", [1, 7, 100_000])
def test_a_terminal_shows_the_same_table(log: str, shown_on: Callable[[bool], io.StringIO], piece: int) -> None:
    out = shown_on(True)
    assert replay(log, piece) == ["[    9 s] rex: dreambooth-rex version 1\n"]
    shown = out.getvalue()
    assert "1 training  3 done  1 failed" in shown
    assert "90/100" in shown
    assert "failed: mug: ValueError: no" in shown
    assert "0:09 so far" in shown


def test_elsewhere_lines_come_as_they_would_from_here(log: str, shown_on: Callable[[bool], io.StringIO]) -> None:
    relayed = shown_on(False)
    replay(log, 100)
    here, clock = shown_on(False), [0.0]
    with batch_console.BatchView(total=4, clock=lambda: clock[0]) as view:
        drive(view, clock)
    assert relayed.getvalue().splitlines() == here.getvalue().splitlines()[:-1]  # all but the plain line
    assert len(relayed.getvalue().splitlines()) >= 4


def test_a_log_stays_small(capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    running = {f"a-subject-{i}": Progress(step=1, steps=9, images_per_second=4.0, loss=0.25) for i in range(256)}
    with RelayedBatchView(total=10_000, clock=lambda: clock[0]) as view:
        for tick in range(7200):  # an hour, twice a second
            clock[0] = tick / 2
            view.update(counted(training=256), running, class_images=None, failures=())
    assert len(capsys.readouterr().err) < 10 << 20


def test_bars_of_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(RELAY_VARIABLE, "1")
    console = RunConsole()
    for title in ("class images", "training"):
        with console.bar(title) as update:
            for done in range(9):
                update(done, 8, "images")
    log = capsys.readouterr().err
    assert log.count("\n") == 4  # the first and the last of each
    monkeypatch.delenv(RELAY_VARIABLE)
    assert replay(log + "a line without an end", 50) == ["a line without an end"]
    assert [line.split("] ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "class images: 0/8 images",
        "class images: 8/8 images",
        "training: 0/8 images",
        "training: 8/8 images",
    ]


def test_only_who_is_told_relays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RELAY_VARIABLE, raising=False)
    assert not relay.relays()
