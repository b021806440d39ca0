"""Metrics of runs and batches for Prometheus, from any process of the cluster.

Every process records through Ray's metrics, and Ray's agent on its node exports them, with `ray_` before the name.
Outside Ray, recording does nothing. Labels are few and short (a lane, a state), never a subject: a batch has thousands.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pipelines.cluster.logs import log

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric: kind, description and labels."""

    kind: Literal["gauge", "counter", "histogram"]
    description: str
    labels: tuple[str, ...] = ()

    def exported(self, name: str) -> tuple[str, ...]:
        """Its names in queries."""
        endings = ("_bucket", "_sum", "_count") if self.kind == "histogram" else ("",)
        return tuple(f"ray_{name}{ending}" for ending in endings)


METRICS = {
    "dreambooth_images_per_second": Metric(
        kind="gauge", description="instance and class images trained on per second by a lane", labels=("lane",)
    ),
    "dreambooth_step_seconds": Metric(kind="histogram", description="seconds of one training step", labels=("lane",)),
    "dreambooth_lane_busy_seconds_total": Metric(
        kind="counter", description="seconds a lane spent on subjects and class images", labels=("lane",)
    ),
    "dreambooth_lane_idle_seconds_total": Metric(
        kind="counter", description="seconds a lane waited for work", labels=("lane",)
    ),
    "dreambooth_class_images_total": Metric(kind="counter", description="class images made"),
    "dreambooth_subjects": Metric(kind="gauge", description="subjects of a batch", labels=("batch", "state")),
    "dreambooth_queue_wait_seconds": Metric(
        kind="histogram", description="seconds between a subject's readiness and its start on a lane"
    ),
    "dreambooth_retries_total": Metric(kind="counter", description="retries of subjects", labels=("batch",)),
    "dreambooth_checkpoint_seconds": Metric(
        kind="histogram", description="seconds until a checkpoint is whole, while training goes on", labels=("lane",)
    ),
    "dreambooth_publish_seconds": Metric(
        kind="histogram", description="seconds to upload a model, read it back and compare it"
    ),
}
"""All recorded metrics by name; infra/monitoring uses no others."""


def record(name: str, value: float, **labels: str) -> None:
    """Set a gauge, add to a counter, or observe a value in a histogram; without Ray, do nothing."""
    ray = sys.modules.get("ray")  # a process that has not imported it runs outside Ray
    if ray is None or not ray.is_initialized():
        return
    metric, kind = _ray_metric(name), METRICS[name].kind
    if kind == "gauge":
        metric.set(value, tags=labels)
    elif kind == "histogram":
        metric.observe(value, tags=labels)
    elif value > 0:  # Ray refuses to add nothing
        metric.inc(value, tags=labels)


def observed(report: Callable[[dict[str, Any]], None], *, lane: str) -> Callable[[dict[str, Any]], None]:
    """Wrap `report` to record and log fine-tuning messages too; for rank 0."""
    last: tuple[int, float] | None = None

    def report_and_record(message: dict[str, Any]) -> None:
        nonlocal last
        if message["kind"] == "step":
            step, now = int(message["metrics"]["step"]), time.perf_counter()
            record("dreambooth_images_per_second", message["metrics"]["images_per_second"], lane=lane)
            if last is not None and step > last[0]:
                record("dreambooth_step_seconds", (now - last[1]) / (step - last[0]), lane=lane)
            last = step, now
        elif message["kind"] == "checkpoint":
            record("dreambooth_checkpoint_seconds", message["seconds"], lane=lane)
            log("checkpoint", step=message["step"], seconds=round(message["seconds"], 3))
        elif message["kind"] == "phase":
            log(message["phase"], **({"step": message["start"]} if "start" in message else {}))
        report(message)

    return report_and_record


@cache
def _ray_metric(name: str) -> Any:
    from ray.util import metrics

    metric = METRICS[name]
    if metric.kind == "histogram":
        return metrics.Histogram(name, metric.description, boundaries=list(_SECONDS), tag_keys=metric.labels)
    kind = metrics.Gauge if metric.kind == "gauge" else metrics.Counter
    return kind(name, metric.description, tag_keys=metric.labels)
