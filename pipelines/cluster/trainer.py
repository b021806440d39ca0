"""Ray Train's trainer without the processes that lanes don't need: each takes seconds to start."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def lane_trainer(*, local: bool) -> Any:
    """A trainer class without Ray Data; on a Ray started for one command (`local`) also without two more actors.

    The cleaner of placement groups is for a cluster that outlives the driver: it asks the cluster's dashboard whether a
    run lives, and without a dashboard of its own it would find another cluster's. The autoscaling coordinator asks a
    cluster for more nodes, and imports Ray Data for it; only an elastic group also asks it how many workers fit.

    What a failed start leaves is removed.
    """
    from ray.train.v2._internal.callbacks import datasets, placement_group_callback
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    unneeded: tuple[type, ...] = (datasets.DatasetsCallback,)
    if local:
        unneeded += (placement_group_callback.PlacementGroupCleanerCallback,)

    class LaneTrainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()
            return [_failed_starts(), *(callback for callback in callbacks if not isinstance(callback, unneeded))]

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            if local and isinstance(arguments["scaling_policy"], FixedScalingPolicy):
                arguments["scaling_policy"] = _without_autoscaler(FixedScalingPolicy)(self.scaling_config)
            return super()._initialize_and_run_controller(**arguments)

    return LaneTrainer


def _without_autoscaler(policy: type) -> Any:
    class WithoutAutoscaler(policy):  # type: ignore[misc]
        def after_controller_start(self, train_run_context: Any) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    return WithoutAutoscaler


def _failed_starts() -> Any:
    """A callback in a lane's controller, before all others, that ends a worker group whose start another one failed.

    Ray Train forgets a group that loses a worker while it joins the process group. Its placement group would keep the
    resources for which the next attempt waits.
    """
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class FailedStarts(WorkerGroupCallback):
        _started: Any = None

        @contextmanager
        def on_worker_group_start(self) -> Iterator[None]:
            try:
                yield
            except Exception:
                if self._started is not None:
                    self._started.shutdown()
                raise

        def before_worker_group_start(self, worker_group_context: Any) -> None:
            self._started = None

        def after_worker_group_start(self, worker_group: Any) -> None:
            self._started = worker_group.get_worker_group_state()

    return FailedStarts()
