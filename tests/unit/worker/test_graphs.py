"""Where a step can't be captured: training goes on without, and the log says why."""

import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dreambooth.config.settings import load_config
from dreambooth.models.base_model import resolve_base_model
from dreambooth.training.model import load_model
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.train_stage import train_task
from pipelines.plan.run_plan import Plan, make_plan
from pipelines.worker.checkpoints import StoredCheckpoints
from pipelines.worker.fine_tune import fine_tune
from pipelines.worker.graphs import Graphs


@pytest.fixture
def plan(tiny_pipeline: Path, instance_folder: Path) -> Callable[..., Plan]:
    def make(*overrides: str) -> Plan:
        subject = {"name": "rex", "class_noun": "dog", "identifier": "tfz", "instance_images": str(instance_folder)}
        plain: dict[str, Any] = {
            "base_model": str(tiny_pipeline),
            "subject": subject,
            "prior": {"prior_loss_weight": 0},
            "train": {"max_train_steps": 1, "graph": "auto"},
            "evaluation": {"enabled": False},
            "storage": {"root": "output"},
        }
        return make_plan(load_config(plain, overrides), Resources(cpus=2, gpus=0))

    return make


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.fields["reason"] for record in caplog.records if record.getMessage() == "not graphed"]  # type: ignore[attr-defined]


def test_a_machine_without_a_gpu(plan: Callable[..., Plan], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dreambooth.worker")
    wanted = plan()
    model = load_model(resolve_base_model(wanted.config.base_model).directory, wanted.config)
    checkpoints = StoredCheckpoints(f"{tmp_path}/checkpoints", need_bytes=0, warn=lambda text: None)
    tuned = fine_tune(train_task(wanted, None), wanted.base, model, "cpu", checkpoints, lambda message: None)
    assert tuned.record["steps"] == 1
    assert reasons(caplog) == ["there is no CUDA device"]


def test_a_captured_step_makes_room_for_samples(plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.worker.graphs.why_not_graphed", lambda *_, **__: None)  # as on a GPU
    wanted, graphs = plan(), Graphs()
    model = load_model(resolve_base_model(wanted.config.base_model).directory, wanted.config)
    engine = graphs.engine(model, train_task(wanted, None), "cpu", 1)
    moment = weakref.ref(engine.optimizer.state[engine.parameters[0]]["exp_avg"])
    engine.close()
    del engine, model
    gc.collect()

    def stays(needed: int) -> bool:
        graphs.make_room("cpu", needed)
        return moment() is not None

    assert stays(1 << 60)  # a CPU has no memory of its own to run short of
    monkeypatch.setattr("pipelines.cluster.processor.device_bytes", lambda device: 1000)
    assert stays(900)
    assert not stays(901)


def test_deepspeed_and_what_is_off(plan: Callable[..., Plan], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dreambooth.worker")
    graphs = Graphs()
    assert graphs.engine(None, replace(train_task(plan(), None), engine="deepspeed"), "cuda", 2) is None
    assert reasons(caplog) == ["engine is deepspeed"]
    assert graphs.engine(None, train_task(plan("train.graph=off"), None), "cuda", 1) is None
    assert len(reasons(caplog)) == 1
