"""Runs and batches of train_elsewhere.py on a cluster, watched message by message while its nodes come and go."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from local_nodes import Cluster, processes_of

from dreambooth.config.settings import DreamBoothConfig

SCRIPT = Path(__file__).with_name("train_elsewhere.py")
Moment = Callable[[dict[str, Any]], bool]


class Training:
    """A run or a batch, in a process of its own, and its messages so far."""

    def __init__(self, cluster: Cluster, folder: Path, name: str, *configs: DreamBoothConfig) -> None:
        self.messages: list[dict[str, Any]] = []
        self._output, self._log = folder / f"{name}.json", folder / f"{name}.log"
        paths = [folder / f"{name}-{number}.yaml" for number in range(len(configs))]
        for path, config in zip(paths, configs, strict=True):
            path.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *map(str, paths), str(self._output)],
                # Notice is looked for every 5 seconds, and tests give less than a cloud does.
                env=dict(cluster.environment) | {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def until(self, what: Moment, *, seconds: float = 240) -> dict[str, Any]:
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
        """Its result, at its end."""
        assert self._process.wait(400) == 0, self._log.read_text()[-5000:]
        result: dict[str, Any] = json.loads(self._output.read_text())
        return result


def begins(message: dict[str, Any]) -> bool:
    """The moment when a training begins or goes on."""
    return bool(message["kind"] == "phase" and message["phase"] == "training")


def at(step: int) -> Moment:
    """The moment of a step, or of a later one."""
    return lambda message: bool(message["kind"] == "step" and message["metrics"]["step"] >= step)


def of(subject: str, moment: Moment) -> Moment:
    """A moment of this subject of a batch."""
    return lambda message: message["subject"] == subject and moment(message)


def announce(cluster: Cluster, node: "subprocess.Popen[str]", *, seconds: int) -> None:
    """Announce to Ray, as a cloud's notice does, that a node will be taken away in so many seconds."""
    [raylet] = [process for process in processes_of(node) if process.name().startswith("raylet")]
    [identity] = [word.split("=", 1)[1] for word in raylet.cmdline() if word.startswith("--node_id=")]
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "drain-node", "--address", cluster.gcs, "--node-id", identity]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
    command += ["--deadline-remaining-seconds", str(seconds)]
    subprocess.run(command, env=dict(cluster.environment), check=True, capture_output=True, timeout=120)
