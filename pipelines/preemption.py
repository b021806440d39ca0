"""Notice that a machine will be taken away: a spot instance that is called back, a pod that is moved.

Whoever takes it away tells Ray to drain the node (`ray drain-node`); Ray Train hears of it and tells the workers.
"""

import os
from collections.abc import Callable

WATCHER_SWITCH = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


def notice() -> Callable[[], bool] | None:
    """Says whether a node of this worker group will go; every rank has to ask as often. None: nobody would tell."""
    import ray.train

    if os.environ.get(WATCHER_SWITCH) == "0":
        return None
    return lambda: ray.train.get_preemption_info() is not None
