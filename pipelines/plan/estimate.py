"""Estimate a plan's memory by tracing a step, and its time by the measured pace of earlier runs and batches."""

from collections.abc import Sequence

from dreambooth.amounts import duration
from pipelines.plan.memory import describe_peak
from pipelines.plan.pace import known_paces, pace_key
from pipelines.plan.run_plan import Plan


def describe_estimate(plans: Sequence[Plan], lanes: int, *, lanes_per_gpu: int = 1) -> list[tuple[str, str]]:
    """(what, value) rows of subjects that are trained in so many lanes."""
    return [describe_peak(plans), ("time", _time(plans, lanes, lanes_per_gpu))]


def _time(plans: Sequence[Plan], lanes: int, lanes_per_gpu: int) -> str:
    """Estimated time of the training steps; class images and samples come on top."""
    root = plans[0].config.storage.root
    known = known_paces(root)
    stages = [stage for plan in plans for stage in plan.stages if stage.config.train.max_train_steps]
    found = [known.get(pace_key(stage, lanes_per_gpu=lanes_per_gpu)) for stage in stages]
    paces = [pace for pace in found if pace is not None]
    if len(paces) < len(found):
        return f"not known before a first result of this base model, these settings and workers is at {root}"
    steps = [stage.config.train.max_train_steps for stage in stages]
    seconds = sum(count / pace.steps_per_second for count, pace in zip(steps, paces, strict=True))
    latest = max(paces, key=lambda pace: pace.day)
    where = "" if len(plans) == 1 else " in each lane"
    return (
        f"about {duration(seconds / lanes)} of steps{where}, at the {latest.steps_per_second:.1f} steps/s "
        f"of {latest.batch} on {latest.day}"
    )
