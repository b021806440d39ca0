"""A run with DeepSpeed on two workers, killed in the middle: what comes out is what would have come out."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from stopping import stop_when

from dreambooth.config.settings import DreamBoothConfig
from pipelines.driver import single
from pipelines.driver.personalize import personalize
from pipelines.driver.run_view import RunView
from pipelines.storage.files import join, read_json
from pipelines.storage.publications import published, read_manifest
from pipelines.tasks import Message
from pipelines.tracking.client import connect, quietly

pytestmark = pytest.mark.recovery
STEPS, EVERY = 200, 45
"""No multiple of ten, at which workers look whether they have to go."""


@pytest.fixture
def interruptible(
    make_config: Any, class_images: Path, tracking_in: Callable[[Path], str]
) -> Callable[[Path], DreamBoothConfig]:
    """The settings of a run in a folder."""

    def make(folder: Path) -> DreamBoothConfig:
        config: DreamBoothConfig = make_config(
            cluster__num_workers=2,
            zero__stage=2,
            train__max_train_steps=STEPS,
            train__checkpoint_every=EVERY,
            train__ema_decay=0.9,
            evaluation__enabled="false",
            storage__run=folder / "run",
            storage__prior=class_images,
            tracking__uri=tracking_in(folder),
        )
        return config

    return make


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Message], None]], None]:
    """Calls a function with every message that a run's view gets."""

    def watch(handle: Callable[[Message], None]) -> None:
        class Watching(RunView):
            def message(self, name: str, message: Message) -> None:
                super().message(name, message)
                handle(message)

        monkeypatch.setattr(single, "RunView", Watching)

    return watch


def record_of(summary: dict[str, Any], config: DreamBoothConfig) -> dict[str, Any]:
    record: dict[str, Any] = read_json(join(config.run_uri, "training", f"{summary['key']}.json"))
    return record


def losses(record: dict[str, Any]) -> list[tuple[float, float, float]]:
    return [(step["step"], step["loss"], step["grad_norm"]) for step in record["history"]]


def weights(summary: dict[str, Any]) -> dict[str, str]:
    return {name: record.sha256 for name, record in read_manifest(summary["model_uri"]).files.items()}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    """The summary and record of a run that nothing happened to, kept by the first test for the second."""
    return {}


@pytest.mark.usefixtures("ray_session")
def test_a_worker_told_to_end_and_a_killed_one_change_nothing(
    interruptible: Callable[[Path], DreamBoothConfig],
    watched: Callable[[Callable[[Message], None]], None],
    tmp_path: Path,
    uninterrupted: dict[str, Any],
) -> None:
    config = interruptible(tmp_path / "calm")
    calm = personalize(config).summary
    uninterrupted["record"] = record_of(calm, config)
    assert [step[0] for step in losses(uninterrupted["record"])] == list(range(1, STEPS + 1))
    assert len(calm["peak_memory_bytes"]) == 2
    assert min(calm["peak_memory_bytes"]) > 100 << 20
    assert not list(Path(config.run_uri, "checkpoints").iterdir())
    assert not Path(config.run_uri, "work").exists()

    ended: list[signal.Signals] = []
    starts: list[int] = []
    checkpoints: list[int] = []

    def strike(message: Message) -> None:
        if message["kind"] == "checkpoint":
            checkpoints.append(message["step"])
        elif message["kind"] == "phase" and message["phase"] == "training":
            starts.append(message["start"])
        elif message["kind"] == "step":
            for how, step in ((signal.SIGTERM, 20), (signal.SIGKILL, STEPS - 100)):
                if message["metrics"]["step"] >= step and how not in ended and (ended or how == signal.SIGTERM):
                    if ended and len(starts) < 2:
                        continue
                    ended.append(how)
                    below = psutil.Process().children(recursive=True)
                    workers = [process for process in below if "RayTrainWorker" in " ".join(process.cmdline())]
                    workers[-1].send_signal(how)

    watched(strike)
    struck_config = interruptible(tmp_path / "struck")
    # Only the killed one is a failure, or there would be one too many.
    cluster = struck_config.cluster.model_copy(update={"max_failures": 1})
    struck_config = struck_config.model_copy(update={"cluster": cluster})
    struck = personalize(struck_config).summary
    assert struck["key"] == calm["key"]
    assert ended == [signal.SIGTERM, signal.SIGKILL]
    [told] = [step for step in checkpoints if step % EVERY]
    assert starts[:2] == [0, told]  # who is told to end loses no step
    assert struck["resumed_from"] in (told, *range(EVERY, STEPS, EVERY))
    assert len(starts) == 3
    assert losses(record_of(struck, struck_config)) == losses(uninterrupted["record"])
    assert weights(struck) == weights(calm)


def test_an_interrupted_and_a_killed_driver_go_on_with_the_same_command(
    interruptible: Callable[[Path], DreamBoothConfig], tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    config = interruptible(tmp_path / "driver")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
    command = [sys.executable, "-m", "pipelines.cli", "run", str(path), "--quiet"]

    interrupted = stop_after(EVERY, signal.SIGINT, command, config)
    assert interrupted.returncode == 130
    assert "run the same command again to resume" in interrupted.stderr
    killed = stop_after(2 * EVERY, signal.SIGKILL, command, config)
    assert killed.returncode == -signal.SIGKILL
    assert published(join(config.run_uri, "model")) is None

    subprocess.run(command, cwd=tmp_path, check=True, timeout=400)
    summary = read_json(join(config.run_uri, "summary.json"))
    assert summary["resumed_from"] >= 2 * EVERY
    assert losses(record_of(summary, config)) == losses(uninterrupted["record"])
    with quietly():
        curve = connect(config.tracking.uri).get_metric_history(summary["mlflow"]["run_id"], "train/loss")
    assert {point.step for point in curve} == set(range(1, STEPS + 1))


def stop_after(
    step: int, how: signal.Signals, command: list[str], config: DreamBoothConfig
) -> subprocess.CompletedProcess[str]:
    """Run a command until a checkpoint of a step, or a later one, is whole, and send it a signal."""
    checkpoints = Path(config.run_uri, "checkpoints")

    def counts() -> bool:
        whole = [path.parent.name.split("-")[1] for path in checkpoints.glob("*/step-*/manifest.json")]
        return any(int(name) >= step for name in whole)

    return stop_when(counts, how, command)
