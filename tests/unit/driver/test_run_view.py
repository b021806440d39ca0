"""What a run's screen says, without a terminal."""

from typing import Any

import pytest

from pipelines.driver.console import RunConsole
from pipelines.driver.run_view import RunView
from pipelines.tasks import STATES, Progress

NOBODY = dict.fromkeys(STATES, 0)


def sampled(view: RunView, *made: int, of: int) -> None:
    for each in made:
        progress = Progress(step=4, steps=4, images_per_second=1.0, loss=0.1, pictures=(each, of))
        view.update(NOBODY, {"rex": progress}, class_images=None, failures=())


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]


def phase(name: str, **facts: Any) -> dict[str, Any]:
    return {"kind": "phase", "phase": name, "time": 1.0, **facts}


def test_each_count_of_pictures_is_shown_once_and_with_its_own_set(capsys: pytest.CaptureFixture[str]) -> None:
    with RunView(RunConsole(), 4) as view:
        view.message("rex", phase("evaluating"))
        sampled(view, 8, 28, 28, of=28)
        view.message("rex", phase("measuring"))
        sampled(view, 28, 28, of=28)
        sampled(view, 2, 116, 116, of=116)
    assert lines(capsys) == [
        "evaluation samples: 8/28 images",
        "evaluation samples: 28/28 images",
        "protocol samples: 2/116 images",
        "protocol samples: 116/116 images",
    ]


def test_what_takes_a_while_before_the_first_step_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with RunView(RunConsole(), 4) as view:
        view.message("rex", phase("loading", up=1.0))
        view.message("rex", phase("training", start=2, workers=1, asked=2))
    assert lines(capsys) == [
        "loading the base model",
        "continuing from the checkpoint of step 2 with 1 of 2 workers",
    ]
