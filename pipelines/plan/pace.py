"""Measured paces: steps per second of earlier runs and batches, stored for the next estimate.

A pace belongs to a base model, an engine, workers and training settings, whatever the subject.
"""

import datetime
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from dreambooth.config.settings import config_hash
from dreambooth.errors import InputError
from pipelines.plan.run_plan import Plan
from pipelines.storage.files import join, read_json, write_json


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Steps per second of one subject's training, by the wall clock, with the run or batch and the day (ISO 8601).

    `gpu` is the kind of the GPUs; empty for a CPU, or where that isn't known.
    """

    steps_per_second: float
    batch: str
    day: str
    gpu: str = ""


def known_paces(root: str) -> dict[str, Pace]:
    """All paces stored under a storage root, by `pace_key`; none of a file that was cut short or is of another form."""
    try:
        return {key: Pace(**pace) for key, pace in read_json(_address(root)).items()}
    except (FileNotFoundError, InputError, TypeError, AttributeError):
        return {}


def remember_paces(
    root: str, batch: str, measured: Iterable[tuple[Plan, float | None]], *, gpu: str = "", lanes_per_gpu: int = 1
) -> None:
    """Store the medians of a batch's (plan, steps per second) on GPUs of a kind, replacing earlier ones.

    None and 0 are no pace: nothing was trained.
    """
    rates: dict[str, list[float]] = {}
    for plan, steps_per_second in measured:
        if steps_per_second:
            rates.setdefault(pace_key(plan, lanes_per_gpu=lanes_per_gpu), []).append(steps_per_second)
    if not rates:
        return
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    new = {
        key: Pace(steps_per_second=round(statistics.median(rate), 3), batch=batch, day=day, gpu=gpu)
        for key, rate in rates.items()
    }
    write_json(_address(root), {key: asdict(pace) for key, pace in (known_paces(root) | new).items()})


def pace_key(plan: Plan, *, lanes_per_gpu: int = 1) -> str:
    """Key of everything a pace depends on, without irrelevant settings (number of steps, seeds, checkpoints)."""
    config = plan.config
    apart = {"caption_dropout", "checkpoint_every_minutes", "keep_unaveraged"}
    train = config.train.model_dump(mode="json", exclude=apart)
    train |= {"max_train_steps": 1, "lr_warmup_steps": 0, "seed": 0, "checkpoint_every": 1}
    scored = [] if config.evaluation.every is None else [f"scored every {config.evaluation.every} steps"]
    zero = [config.zero.model_dump()] if plan.engine == "deepspeed" else []
    workers = f"{config.cluster.num_workers} x {config.cluster.cpus_per_worker} {'cuda' if plan.use_gpu else 'cpu'}"
    workers += f", {lanes_per_gpu} lanes a GPU" if lanes_per_gpu > 1 else ""
    size = f"{config.images.resolution} px, {'with' if plan.prior else 'without'} class images"
    size += ", in buckets" if config.images.aspect_buckets else ""
    return config_hash(plan.base.hash, plan.engine, *zero, workers, size, train, *scored)


def _address(root: str) -> str:
    return join(root, "batches", "paces.json")
