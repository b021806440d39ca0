"""Ray Train with DeepSpeed on two workers, killed in the middle: what comes out is what would have come out."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dreambooth.config.settings import DreamBoothConfig
from pipelines.cluster.events import event_queue
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.train_stage import TrainResult, train
from pipelines.plan.run_plan import Plan, make_plan
from pipelines.stages.prior_stage import make_class_images
from pipelines.storage.publications import join, published, read_json
from pipelines.tasks import PriorSet, Source
from pipelines.tracking.client import connect, quietly
from pipelines.worker.sampler_pool import SamplerPool

pytestmark = pytest.mark.recovery
STEPS, EVERY = 160, 40
FOUR_CPUS = Resources(cpus=4, gpus=0)


def losses(result: TrainResult) -> list[tuple[float, float, float]]:
    return [(step["step"], step["loss"], step["grad_norm"]) for step in result.history]


@pytest.fixture
def interruptible(make_config: Any, class_images: Path) -> Callable[[Path], DreamBoothConfig]:
    """The settings of a run in a folder."""

    def make(folder: Path) -> DreamBoothConfig:
        config: DreamBoothConfig = make_config(
            cluster__num_workers=2,
            zero__stage=2,
            train__max_train_steps=STEPS,
            train__checkpoint_every=EVERY,
            train__ema_decay=0.9,
            storage__run=folder / "run",
            storage__prior=class_images,
            tracking__uri=f"sqlite:///{folder}/mlflow.db",
        )
        return config

    return make


def run(plan: Plan, handle: Any) -> TrainResult:
    source = Source(address=plan.config.base_model)
    assert plan.prior is not None
    prior_set: PriorSet = make_class_images(
        plan.prior, source, plan.config.prior_uri, SamplerPool(actors=1, use_gpu=False)
    )
    with event_queue(handle, pytest.fail) as events:
        return train(plan, prior_set, events)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, TrainResult]:
    """The result of a run that nothing happened to, kept by the first test for the second."""
    return {}


@pytest.mark.usefixtures("ray_session")
def test_a_worker_told_to_end_and_a_killed_one_change_nothing(
    interruptible: Callable[[Path], DreamBoothConfig], tmp_path: Path, uninterrupted: dict[str, TrainResult]
) -> None:
    plan = make_plan(interruptible(tmp_path / "calm"), FOUR_CPUS)
    calm = uninterrupted["result"] = run(plan, lambda message: None)
    assert [step["step"] for step in calm.history] == list(range(1, STEPS + 1))
    assert len(calm.peak_memory_bytes) == 2
    assert min(calm.peak_memory_bytes) > 100 << 20
    assert not Path(join(plan.config.run_uri, "checkpoints", f"coral-car-{plan.key}")).exists()

    ended: list[signal.Signals] = []
    starts: list[int] = []
    checkpoints: list[int] = []

    def strike(message: dict[str, Any]) -> None:
        if message["kind"] == "checkpoint":
            checkpoints.append(message["step"])
        elif message["kind"] == "phase" and message["phase"] == "training":
            starts.append(message["start"])
        elif message["kind"] == "step":
            for how, step in ((signal.SIGTERM, EVERY // 2), (signal.SIGKILL, STEPS - 30)):
                if message["metrics"]["step"] >= step and how not in ended:
                    ended.append(how)
                    below = psutil.Process().children(recursive=True)
                    workers = [process for process in below if "RayTrainWorker" in " ".join(process.cmdline())]
                    workers[-1].send_signal(how)

    struck_plan = make_plan(interruptible(tmp_path / "struck"), FOUR_CPUS)
    assert struck_plan.key == plan.key
    struck = run(struck_plan, strike)
    assert ended == [signal.SIGTERM, signal.SIGKILL]
    assert checkpoints[0] % EVERY
    assert starts[:2] == [0, checkpoints[0]]  # who is told to end loses no step
    assert struck.resumed_from in range(EVERY, STEPS, EVERY)
    assert losses(struck) == losses(calm)
    assert {name: record.sha256 for name, record in struck.model.files.items()} == {
        name: record.sha256 for name, record in calm.model.files.items()
    }


def test_an_interrupted_and_a_killed_driver_go_on_with_the_same_command(
    interruptible: Callable[[Path], DreamBoothConfig], tmp_path: Path, uninterrupted: dict[str, TrainResult]
) -> None:
    config = interruptible(tmp_path / "driver")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
    command = [sys.executable, "-m", "pipelines.cli", "run", str(path), "--quiet"]

    interrupted = stop_after(EVERY, signal.SIGINT, command, config)
    assert interrupted.returncode == 130
    assert "the same command goes on" in interrupted.stderr
    killed = stop_after(2 * EVERY, signal.SIGKILL, command, config)
    assert killed.returncode == -signal.SIGKILL
    assert published(join(config.run_uri, "model")) is None

    subprocess.run(command, cwd=tmp_path, check=True, timeout=400)
    summary = read_json(join(config.run_uri, "summary.json"))
    assert summary["resumed_from"] in range(EVERY, STEPS, EVERY)
    record = read_json(join(config.run_uri, "training", f"{summary['key']}.json"))
    assert [(step["step"], step["loss"], step["grad_norm"]) for step in record["history"]] == losses(
        uninterrupted["result"]
    )
    with quietly():
        curve = connect(config.tracking.uri).get_metric_history(summary["mlflow"]["run_id"], "loss")
    assert {point.step for point in curve} == set(range(1, STEPS + 1))


def stop_after(
    step: int, how: signal.Signals, command: list[str], config: DreamBoothConfig
) -> subprocess.CompletedProcess[str]:
    """Run a command until a checkpoint of a step counts, as Ray Train says in its snapshot, and send it a signal."""
    checkpoints = Path(config.run_uri, "checkpoints")

    def counts() -> bool:
        return any(
            f"step-{step:08d}-" in path.read_text() for path in checkpoints.glob("*/checkpoint_manager_snapshot.json")
        )

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as driver:
        deadline = time.monotonic() + 300
        while not counts():
            assert driver.poll() is None, driver.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        driver.send_signal(how)
        _, stderr = driver.communicate(timeout=120)
    return subprocess.CompletedProcess(command, driver.returncode, stderr=stderr)
