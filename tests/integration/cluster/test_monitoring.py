"""What Ray really exports of the metrics, under the names that infra/monitoring asks for."""

import time
import urllib.request
from typing import Any

import pytest

from pipelines.cluster.metrics import METRICS, record

SECONDS = 60  # Ray's processes report every ten


def exported(node: dict[str, Any]) -> set[str]:
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {line.partition("{")[0].partition(" ")[0] for line in lines if not line.startswith("#")}


@pytest.mark.usefixtures("ray_session")
def test_ray_exports_them_under_the_names_that_are_asked_for() -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Worker:
        def record_all(self) -> None:
            for name, metric in METRICS.items():
                record(name, 1.0, **dict.fromkeys(metric.labels, "a"))

    worker = Worker.remote()
    ray.get(worker.record_all.remote())
    wanted = {ending for name, metric in METRICS.items() for ending in metric.exported(name)}
    deadline = time.monotonic() + SECONDS
    while (missing := wanted - exported(ray.nodes()[0])) and time.monotonic() < deadline:
        time.sleep(1)
    assert not missing
