"""Ray Train's trainer without the processes that lanes don't need: each takes seconds to start."""

from typing import Any


def lane_trainer(*, keep_cleaner: bool) -> Any:
    """A TorchTrainer class without Ray Data, and without `keep_cleaner` also without a cleaner of placement groups.

    The cleaner is for a cluster that outlives the driver. It asks the cluster's dashboard whether a run lives: a Ray
    started for one command has none, and the cleaner would find another cluster's.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import datasets, placement_group_callback

    unneeded: tuple[type, ...] = (datasets.DatasetsCallback,)
    if not keep_cleaner:
        unneeded += (placement_group_callback.PlacementGroupCleanerCallback,)

    class LaneTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
            return [callback for callback in callbacks if not isinstance(callback, unneeded)]

    return LaneTrainer
