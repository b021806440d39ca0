"""Notice that a machine will be taken away: a spot instance that is called back, a pod that is moved.

Whoever takes it away tells Ray to drain the node (`ray drain-node`); Ray Train hears of it and tells the workers.
"""

import os
from collections.abc import Callable

from pipelines.logs import log

WATCHER_SWITCH = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_NOTICE_EVERY = 10
"""Steps between two questions whether a machine will be taken away: each is a barrier, and a notice is minutes long."""


def notice() -> Callable[[], bool] | None:
    """Says whether a node of this worker group will go; every rank has to ask as often. None: nobody would tell."""
    import ray.train

    if os.environ.get(WATCHER_SWITCH) == "0":
        return None
    return lambda: ray.train.get_preemption_info() is not None


class Leaving:
    """Asks now and then whether a machine will be taken away, until it is so; that is said once."""

    def __init__(self, leaving: Callable[[], bool] | None) -> None:
        self._leaving = leaving

    def noticed(self, step: int) -> bool:
        """Whether it has just been announced; every rank has to ask at every step."""
        if self._leaving is None or step % _NOTICE_EVERY or not self._leaving():
            return False
        self._leaving = None
        log("leaving", step=step)
        return True
