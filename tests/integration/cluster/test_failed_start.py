"""A worker group whose start fails: the next attempt gets the resources that it held."""

import os
from pathlib import Path
from typing import Any

import pytest
import ray.train
from ray.train.backend import Backend, BackendConfig

from pipelines.cluster.trainer import lane_trainer


@pytest.mark.recovery
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_dies_while_its_group_joins_leaves_room_for_the_next_attempt(tmp_path: Path) -> None:
    joined, ran = tmp_path / "joined", tmp_path / "ran"

    # Within the test: Ray sends them by value to processes that can't import it.
    class Dying(Backend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            if not joined.exists():
                joined.touch()
                worker_group.execute_single(1, os._exit, 1)

    class DyingConfig(BackendConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Dying

    def train() -> None:
        ran.touch()

    lane_trainer(local=True)(
        train,
        backend_config=DyingConfig(),
        # All of Ray's four CPUs, so that a group that is left keeps the next one out.
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 2}),
        run_config=ray.train.RunConfig(name="dying", storage_path=str(tmp_path)),
    ).fit()
    assert joined.exists()
    assert ran.exists()
