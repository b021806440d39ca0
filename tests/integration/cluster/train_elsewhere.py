"""Runs a configuration, or several as a batch, on a cluster that runs already, and prints what its lanes report.

    RAY_AUTH_TOKEN=... python train_elsewhere.py CONFIG.yaml [CONFIG.yaml ...] OUTPUT.json

Every message is a line of JSON. OUTPUT gets the history of every finished training, and how many workers ended it: of a
batch by subject, with its row of the summary.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreambooth.config.settings import DreamBoothConfig, load_config
from pipelines.cluster.ray_cluster import ray_cluster
from pipelines.driver import single
from pipelines.driver.batch import run_batch
from pipelines.driver.console import RunConsole
from pipelines.driver.personalize import personalize
from pipelines.driver.run_view import RunView
from pipelines.plan.batch_plan import make_batch_plan
from pipelines.plan.run_plan import make_plan
from pipelines.storage.files import join, read_json
from pipelines.tasks import Message, Progress, State


class Printing(RunView):
    """Prints every message."""

    def message(self, name: str, message: Message) -> None:
        """Print a message."""
        print(json.dumps({"subject": name} | message), flush=True)


class PrintingBatch:
    """Prints every message and line of a batch."""

    def update(
        self,
        counts: Mapping[State, int],
        running: Mapping[str, Progress],
        *,
        class_images: tuple[int, int] | None,
        failures: Sequence[tuple[str, str]],
    ) -> None:
        """Show nothing."""

    def line(self, text: str) -> None:
        """Print a line."""
        print(text, flush=True)

    def message(self, name: str, message: Message) -> None:
        """Print a message."""
        print(json.dumps({"subject": name} | message), flush=True)


def run(config: DreamBoothConfig) -> dict[str, Any]:
    """Run one subject."""
    single.RunView = Printing  # type: ignore[misc]
    result = personalize(config, RunConsole(quiet=True))
    return trained(result.run_uri, str(result.summary["key"]))


def batch(configs: Sequence[DreamBoothConfig]) -> dict[str, Any]:
    """Run several subjects as a batch."""
    with ray_cluster(configs[0].cluster) as resources:
        plan = make_batch_plan("batch", [make_plan(config, resources) for config in configs], resources)
        outcome = run_batch(plan, PrintingBatch(), None)
    rows = {row["subject"]: row for row in outcome.summary["results"]}
    return {
        one.config.subject.name: rows[one.config.subject.name] | trained(one.config.run_uri, one.key)
        for one in plan.subjects
    }


def trained(uri: str, key: str) -> dict[str, Any]:
    """The record of a training."""
    record = read_json(join(uri, "training", f"{key}.json"))
    return {"history": record["history"], "workers": len(record["peak_memory_bytes"])}


if __name__ == "__main__":
    *configurations, output = map(Path, sys.argv[1:])
    loaded = [load_config(path) for path in configurations]
    output.write_text(json.dumps(run(loaded[0]) if len(loaded) == 1 else batch(loaded)))
