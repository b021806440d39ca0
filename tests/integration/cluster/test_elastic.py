"""A cluster that shrinks and grows: a training of two workers goes on with one, and with two again."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from elsewhere import Training, announce, at, begins
from local_nodes import Cluster, kill_node, started

STEPS, EVERY = 900, 150
NOTICE_SECONDS = 15

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with started(tmp_path_factory.mktemp("cluster"), (0, 1, 1)) as cluster:
        yield cluster


@pytest.fixture
def training(cluster: Cluster, make_config: Any, tmp_path: Path) -> Callable[[str], Training]:
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
        return Training(cluster, tmp_path, name, config)

    return start


def test_two_workers_one_and_two_again(cluster: Cluster, training: Callable[[str], Training]) -> None:
    """The first node goes after a notice: a checkpoint is written then, whatever step it is."""
    calm = training("calm").result()
    assert calm["workers"] == 2
    run = training("shaken")
    assert run.until(begins) | {"time": 0} == {
        "subject": "coral-car", "kind": "phase", "phase": "training", "time": 0, "start": 0, "workers": 2, "asked": 2,
    }  # fmt: skip
    run.until(at(20))
    gone = cluster.nodes[-1]
    announce(cluster, gone, seconds=NOTICE_SECONDS)
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
