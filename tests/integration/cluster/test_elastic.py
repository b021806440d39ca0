"""A cluster that shrinks and grows: a training of two workers goes on with one, and with two again."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from local_nodes import Cluster, kill_node, processes_of, started

SCRIPT = Path(__file__).with_name("train_elsewhere.py")
STEPS, EVERY = 900, 150
NOTICE_SECONDS = 15

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with started(tmp_path_factory.mktemp("cluster"), (0, 1, 1)) as cluster:
        yield cluster


@pytest.fixture
def training(cluster: Cluster, make_config: Any, tmp_path: Path) -> Callable[[str], "Training"]:
    def start(name: str) -> Training:
        config = make_config(
            cluster__address=cluster.gcs,
            cluster__num_workers=2,
            cluster__min_workers=1,
            cluster__resize_seconds=5,
            zero__stage=2,
            prior__prior_loss_weight=0,
            train__max_train_steps=STEPS,
            train__checkpoint_every=EVERY,
            storage__root=str(tmp_path / name),
            evaluation__enabled="false",
            tracking__uri=f"sqlite:///{tmp_path}/{name}.db",
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
        return Training(cluster, path)

    return start


class Training:
    """A run of train_elsewhere.py, and what it has told so far."""

    def __init__(self, cluster: Cluster, path: Path) -> None:
        self.messages: list[dict[str, Any]] = []
        self._output, self._log = path.with_suffix(".json"), path.with_suffix(".log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(path), str(self._output)],
                env=dict(cluster.environment),
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def until(self, what: Callable[[dict[str, Any]], bool], *, seconds: float = 240) -> dict[str, Any]:
        """Wait for a message that wasn't there before."""
        deadline, seen = time.monotonic() + seconds, len(self.messages)
        while time.monotonic() < deadline:
            lines = self._log.read_text().splitlines()
            self.messages = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
            for message in self.messages[seen:]:
                if what(message):
                    return message
            assert self._process.poll() is None, self._log.read_text()[-5000:]
            time.sleep(0.2)
        raise AssertionError(f"not within {seconds} s:\n{self._log.read_text()[-5000:]}")

    def result(self) -> dict[str, Any]:
        """How it ended."""
        assert self._process.wait(400) == 0, self._log.read_text()[-5000:]
        result: dict[str, Any] = json.loads(self._output.read_text())
        return result


def begins(message: dict[str, Any]) -> bool:
    return bool(message["kind"] == "phase" and message["phase"] == "training")


def at(step: int) -> Callable[[dict[str, Any]], bool]:
    return lambda message: bool(message["kind"] == "step" and message["metrics"]["step"] >= step)


def announce(cluster: Cluster, node: "subprocess.Popen[str]") -> None:
    """Tell Ray, as a cloud's notice does, that a node will be taken away."""
    [raylet] = [process for process in processes_of(node) if process.name().startswith("raylet")]
    [identity] = [word.split("=", 1)[1] for word in raylet.cmdline() if word.startswith("--node_id=")]
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "drain-node", "--address", cluster.gcs, "--node-id", identity]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
    command += ["--deadline-remaining-seconds", str(NOTICE_SECONDS)]
    subprocess.run(command, env=dict(cluster.environment), check=True, capture_output=True, timeout=120)


def test_two_workers_one_and_two_again(cluster: Cluster, training: Callable[[str], Training]) -> None:
    """The first node goes after a notice: a checkpoint is written then, whatever step it is."""
    calm = training("calm").result()
    assert calm["workers"] == 2
    run = training("shaken")
    assert run.until(begins) | {"time": 0} == {
        "kind": "phase", "phase": "training", "time": 0, "start": 0, "workers": 2, "asked": 2,
    }  # fmt: skip
    run.until(at(20))
    gone = cluster.nodes[-1]
    announce(cluster, gone)
    noticed = run.until(lambda message: message["kind"] == "checkpoint")
    assert noticed["step"] % EVERY
    time.sleep(NOTICE_SECONDS)
    kill_node(gone)
    alone = run.until(begins)
    assert alone["workers"] == 1
    assert alone["start"] >= noticed["step"]
    run.until(at(alone["start"] + 20))
    cluster.add_node(1)
    again = run.until(begins)
    assert again["workers"] == 2
    assert again["start"] > 0
    result = run.result()
    assert result["workers"] == 2
    steps, expected = result["history"], calm["history"]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    for name, tolerance in (("loss", 0.02), ("grad_norm", 0.1)):
        got, wanted = ([step[name] for step in history] for history in (steps, expected))
        assert got[:300] == pytest.approx(wanted[:300], rel=tolerance)
    assert [step["learning_rate"] for step in steps] == [step["learning_rate"] for step in expected]
