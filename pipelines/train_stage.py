"""One subject's fine-tuning as a Ray Train run: the driver's side.

The same command after a crash of the driver finds the checkpoints of the plan's key, and a finished one its published
model, and trains nothing.
"""

import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dreambooth.config import DreamBoothConfig
from pipelines.cluster import WORKER_ENVIRONMENT, worker_group
from pipelines.plan import Plan
from pipelines.preemption import answering_workers
from pipelines.storage import Manifest, join, published, pyarrow_filesystem, read_json, remove
from pipelines.tasks import PriorSet, TrainTask
from pipelines.train_worker import train_worker


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A published, verified model and how it came about: one mapping of metrics a step, bytes of memory by rank.

    `steps` is how many were made, `exported_step` the one whose weights the model has; `scores` has one mapping a
    measurement.
    """

    model: Manifest
    history: tuple[Mapping[str, float], ...]
    scores: tuple[Mapping[str, float], ...]
    steps: int
    exported_step: int
    peak_memory_bytes: tuple[int, ...]
    steps_per_second: float
    resumed_from: int


def find_result(plan: Plan) -> TrainResult | None:
    """The result of an earlier run of the same plan, or None."""
    manifest = find_model(plan.config, plan.key)
    if manifest is None:
        return None
    record = read_json(join(plan.config.run_uri, "training", f"{plan.key}.json"))
    return TrainResult(
        model=manifest,
        history=tuple(record["history"]),
        scores=tuple(record["scores"]),
        steps=record["steps"],
        exported_step=record["exported_step"],
        peak_memory_bytes=tuple(record["peak_memory_bytes"]),
        steps_per_second=record["steps_per_second"],
        resumed_from=record["resumed_from"],
    )


def find_model(config: DreamBoothConfig, key: str) -> Manifest | None:
    """The published model of a plan's key, or None."""
    manifest = published(join(config.run_uri, "model"))
    return manifest if manifest is not None and manifest.metadata.get("key") == key else None


def train(plan: Plan, prior_set: PriorSet | None, events: Any) -> TrainResult:
    """Fine-tune, export, publish and verify; goes on from the last checkpoint of an interrupted run.

    Raises RuntimeError when the loss stops being a number, there is no room for what is written, or the workers failed
    more often than allowed.
    """
    if (result := find_result(plan)) is None:
        reason = _fit(plan, prior_set, events)
        if reason is not None:
            raise RuntimeError(reason)
        result = find_result(plan)
    if result is None:
        raise RuntimeError(f"training ended, but there is no model at {join(plan.config.run_uri, 'model')}")
    remove(join(plan.config.run_uri, "checkpoints", plan.key))
    return result


def _fit(plan: Plan, prior_set: PriorSet | None, events: Any) -> str | None:
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    cluster = plan.config.cluster
    storage_filesystem, storage_path = pyarrow_filesystem(join(plan.config.run_uri, "lanes"))
    task = train_task(plan, prior_set)
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]
        train_loop_config={"task": task, "events": events},
        scaling_config=worker_group(cluster, use_gpu=plan.use_gpu),
        # mypy sees the RunConfig of Ray Train V1, the interpreter V2's.
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            # A name that was used before would be taken for a run to go on with.
            name=secrets.token_hex(4),
            storage_path=storage_path,
            storage_filesystem=storage_filesystem,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            worker_runtime_env=WORKER_ENVIRONMENT,
            callbacks=[answering_workers()],
        ),
    )
    try:
        with _interruptible():
            reason: str | None = trainer.fit().return_value  # type: ignore[attr-defined]
            return reason
    except TrainingFailedError as error:
        raise RuntimeError(f"training {plan.config.subject.name} failed: {str(error).strip()}") from None


def train_task(plan: Plan, prior_set: PriorSet | None) -> TrainTask:
    """What a plan's workers are told."""
    return TrainTask(
        config=plan.config,
        images=plan.images,
        prior_set=prior_set,
        protocol=plan.protocol,
        engine=plan.engine,
        key=plan.key,
        data_hash=plan.data_hash,
        base_hash=plan.base.hash,
        checkpoint_bytes=plan.checkpoint_bytes,
        sampling_dtype=plan.sampling_dtype,
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ray Train takes SIGINT for itself, ends the process with status 0 on it, and never gives it back."""
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, before)
