"""Trains on a cluster that runs already and prints what its workers tell; started by test_elastic.py.

    RAY_AUTH_TOKEN=... python train_elsewhere.py CONFIG.yaml OUTPUT.json

Every message is a line of JSON. OUTPUT gets the history of the finished training, and how many workers ended it.
"""

import json
import sys
from pathlib import Path
from typing import Any

from dreambooth.config.settings import load_config
from pipelines.cluster.events import event_queue
from pipelines.cluster.ray_cluster import ray_cluster
from pipelines.driver.train_stage import train
from pipelines.plan.run_plan import make_plan


def _print(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _raise(error: Exception) -> None:
    raise error


if __name__ == "__main__":
    configuration, output = load_config(Path(sys.argv[1])), Path(sys.argv[2])
    with ray_cluster(configuration.cluster) as resources:
        plan = make_plan(configuration, resources)
        with event_queue(_print, _raise) as events:
            result = train(plan, None, events)
    output.write_text(json.dumps({"history": result.history, "workers": len(result.peak_memory_bytes)}))
