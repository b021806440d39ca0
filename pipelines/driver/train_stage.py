"""One subject's fine-tuning as a Ray Train run: the driver's side.

The run is named by the plan's key, so the same command after a crash of the driver finds its checkpoints, and a
finished one finds its published model and trains nothing.
"""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dreambooth.errors import Diverged
from pipelines.cluster.preemption import answering_workers
from pipelines.cluster.ray_cluster import WORKER_ENVIRONMENT, worker_group
from pipelines.plan.run_plan import Plan
from pipelines.stages.published_model import find_model
from pipelines.storage.publications import Manifest, exists, filesystem, join, pyarrow_filesystem, read_json
from pipelines.tasks import PriorSet, TrainTask
from pipelines.worker.train_worker import diverged_uri, train_worker

CHECKPOINTS_KEPT = 2


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


def train(plan: Plan, prior_set: PriorSet | None, events: Any) -> TrainResult:
    """Fine-tune, export, publish and verify; goes on from the last checkpoint of an interrupted run.

    Raises Diverged when the loss stops being a number, RuntimeError when the workers failed more often than allowed.
    """
    reason = diverged_uri(plan.config, plan.key)
    if (result := find_result(plan)) is None:
        if exists(reason):
            _take(reason)
        _fit(plan, prior_set, events)
        result = find_result(plan)
    if result is None and exists(reason):
        _remove_checkpoints(plan)
        raise Diverged(_take(reason))
    if result is None:
        raise RuntimeError(f"training ended, but there is no model at {join(plan.config.run_uri, 'model')}")
    _remove_checkpoints(plan)
    return result


def _fit(plan: Plan, prior_set: PriorSet | None, events: Any) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    cluster = plan.config.cluster
    storage_filesystem, storage_path = pyarrow_filesystem(join(plan.config.run_uri, "checkpoints"))
    task = train_task(plan, prior_set)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"task": task, "events": events},
        scaling_config=worker_group(cluster, use_gpu=plan.use_gpu),
        # mypy sees the RunConfig of Ray Train V1, the interpreter V2's.
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=run_name(plan),
            storage_path=storage_path,
            storage_filesystem=storage_filesystem,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            worker_runtime_env=WORKER_ENVIRONMENT,
            callbacks=[answering_workers()],
        ),
    )
    try:
        with _interruptible():
            trainer.fit()
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


def _take(uri: str) -> str:
    """Read a message and remove it: it is news once."""
    message = str(read_json(uri))
    fs, path = filesystem(uri)
    fs.rm_file(path)
    return message


def run_name(plan: Plan) -> str:
    """Name of the Ray Train run."""
    return f"{plan.config.subject.name}-{plan.key}"


def _remove_checkpoints(plan: Plan) -> None:
    """The model is published and verified: its checkpoints, three times its size, have done their work."""
    fs, path = filesystem(join(plan.config.run_uri, "checkpoints", run_name(plan)))
    if fs.exists(path):
        fs.rm(path, recursive=True)
