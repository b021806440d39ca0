"""The GPU's benchmark keeps what it measured, whatever else fails, and measures every engine."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from attempts import Attempts
from gpu import SIZES, measure, measures_of
from gpu_engines import Bench
from stamps import Figures


def raising(error: Exception) -> Figures:
    raise error


def test_what_fails_costs_no_other_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    attempts, written, cleared = Attempts(60), list[Figures](), list[None]()
    measures = {
        "out of memory": (partial(raising, torch.OutOfMemoryError("CUDA out of memory.\nTried")), 5.0),
        "first": (lambda: {"steps_per_second": 2.0}, 5.0),
        "too long": (lambda: {"slept": time.sleep(5)}, 0.05),
        "broken": (partial(raising, ValueError("no such kernel")), 5.0),
        "last": (lambda: {"steps_per_second": 3.0}, 5.0),
    }
    measure(measures, attempts, lambda: cleared.append(None), lambda found: written.append(dict(found)))
    assert [list(found) for found in written] == [list(measures)[: count + 1] for count in range(5)]
    assert len(cleared) == len(measures)
    assert written[-1] == {
        "out of memory": {"not_measured": "out of memory: CUDA out of memory."},
        "first": {"steps_per_second": 2.0},
        "too long": {"not_measured": "it took longer than 0.05 s"},
        "broken": {"not_measured": "ValueError: no such kernel"},
        "last": {"steps_per_second": 3.0},
    }
    assert attempts.errors == 1
    assert "no such kernel" in capsys.readouterr().err


def test_the_whole_run_has_an_end() -> None:
    attempts = Attempts(0.2)
    assert attempts(lambda: {"slept": time.sleep(5)}, 60) == {"not_measured": "it took longer than 0.2 s"}
    assert "was over" in attempts(lambda: {"figure": 1}, 60)["not_measured"]


@pytest.fixture
def measures(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return measures_of(SIZES["miniature"], tiny_pipeline, "cpu")


def test_the_papers_run_writes_its_checkpoints_and_says_why_it_was_not_graphed(measures: Any, tmp_path: Path) -> None:
    run, _ = measures["paper's run"]
    found = run()
    assert (found["steps"], found["checkpoints"], len(found["whole_after_seconds"])) == (10, 2, 2)
    assert found["seconds"] > 0
    assert found["not_graphed"] == ["there is no CUDA device"]
    assert list((tmp_path / "output" / "bench").iterdir()) == []


def test_every_engine_is_measured(measures: Any) -> None:
    assert {"torch", "torch, graphs", "deepspeed zero 2, bf16", "deepspeed zero 3, gather_blocks"} <= set(measures)
    assert {"two lanes", "two lanes, graphs", "class images", "loop"} <= set(measures)
    for name in ("torch", "torch, graphs"):
        found = measures[name][0]()
        assert found["steps_per_second"] > 0
        assert 0 < found["busy_share"] <= 1
        assert ("not_graphed" in found) == (name == "torch, graphs")


def test_a_device_without_counters_has_no_peak(tiny_pipeline: Path) -> None:
    assert Bench(tiny_pipeline, 64, "cpu", steps=1).peak() == {}
