"""A batch on a cluster whose nodes come and go: subjects move, no failure is counted, and losses stay the same."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from elsewhere import Training, announce, at, begins, of
from local_nodes import Cluster, started

FIRST, SECOND = "first", "second"
NOTICE_SECONDS = 6

pytestmark = [pytest.mark.recovery, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with started(tmp_path_factory.mktemp("cluster"), (0, 1, 1)) as cluster:
        yield cluster


@pytest.fixture
def batch(
    cluster: Cluster, make_config: Any, tracking_in: Callable[[Path], str], tmp_path: Path
) -> Callable[..., Training]:
    """Two subjects of the same photographs, so that undisturbed they have the same losses."""

    def start(**settings: Any) -> Training:
        if cluster.nodes_there() < 3:  # an earlier test has lost one
            cluster.add_node(1)
            cluster.wait(nodes=3)
        common = {
            "cluster__address": cluster.gcs,
            "engine": "torch",
            "prior__prior_loss_weight": 0,
            "storage__root": tmp_path / "out",
            "evaluation__enabled": "false",
            "tracking__uri": tracking_in(tmp_path),
        }
        configs = [make_config(**common | settings, subject__name=name) for name in (FIRST, SECOND)]
        return Training(cluster, tmp_path, "batch", *configs)

    return start


def test_a_preempted_lane_gives_its_subject_to_another(cluster: Cluster, batch: Callable[..., Training]) -> None:
    """Its node may be there for longer than announced: nobody waits for its end."""
    steps = 700
    run = batch(cluster__lanes=2, train__max_train_steps=steps, train__checkpoint_every=steps)
    for name in (FIRST, SECOND):
        run.until(of(name, at(20)))
    announce(cluster, cluster.nodes[-1], seconds=NOTICE_SECONDS)
    noticed = run.until(lambda message: message["kind"] == "checkpoint")
    again = run.until(of(noticed["subject"], begins), seconds=400)
    assert again["start"] == noticed["step"] < steps
    result = run.result()
    assert {name: row["attempts"] for name, row in result.items()} == {
        name: 2 if name == noticed["subject"] else 1 for name in (FIRST, SECOND)
    }
    assert {row["failures"] for row in result.values()} == {0}
    losses = [[(step["step"], step["loss"]) for step in result[name]["history"]] for name in (FIRST, SECOND)]
    assert len(losses[0]) == steps
    assert losses[0] == losses[1]
