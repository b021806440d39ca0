"""Fine-tuning one subject on one worker, whoever runs it: a run of its own, or a lane that goes through many."""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dreambooth.config.addresses import shown
from dreambooth.config.settings import DreamBoothConfig
from dreambooth.data.images import png_bytes
from dreambooth.models.base_model import BaseModel
from dreambooth.training.best_checkpoint import Scores
from pipelines.cluster.collectives import from_all_ranks
from pipelines.cluster.events import Message
from pipelines.cluster.logs import log
from pipelines.cluster.metrics import record
from pipelines.cluster.preemption import Leaving
from pipelines.storage.publications import Manifest, join, opened, publish, write_json
from pipelines.tasks import TrainTask
from pipelines.worker.train_data import ClassLatents, train_data

if TYPE_CHECKING:
    from dreambooth.training.loop import StepMetrics

_PROGRESS = "progress.json"


@dataclass(kw_only=True)
class History:
    """Where a run stands; kept in every checkpoint, so that a resumed run ends with the whole history."""

    step: int = 0
    metrics: list[dict[str, float]] = field(default_factory=list)
    scores: Scores = field(default_factory=Scores)

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint's folder."""
        scores = [score.as_dict() for score in self.scores.measured]
        progress = {"step": self.step, "metrics": self.metrics, "scores": scores}
        Path(folder, _PROGRESS).write_text(json.dumps(progress))
        self.scores.save(folder)

    @classmethod
    def load(cls, folder: Path) -> "History":
        """What `save` wrote."""
        progress = json.loads(Path(folder, _PROGRESS).read_text())
        scores = Scores.load(folder, progress["scores"])
        return cls(step=progress["step"], metrics=progress["metrics"], scores=scores)


class Checkpoints(Protocol):
    """Where a worker group keeps what it needs to go on. Every rank calls both."""

    def restore(self, engine: Any) -> History:
        """Load the newest checkpoint into the engine; an empty history where there is none."""

    def save(self, engine: Any, history: History) -> None:
        """Write a checkpoint."""


class Stopped(RuntimeError):
    """The worker was asked to stop; a checkpoint has been written."""


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """What comes out: the exported parameters (on rank 0), and a record of how, for `find_result`."""

    state: Mapping[str, Any]
    record: dict[str, Any]


def fine_tune(
    task: TrainTask,
    base: BaseModel,
    model: Any,
    device: str,
    checkpoints: Checkpoints,
    tell: Callable[[Message], None],
    stopping: Callable[[], bool] | None = None,
    leaving: Callable[[], bool] | None = None,
    class_latents: ClassLatents | None = None,
) -> FineTuned:
    """Restore, fit, gather. `tell` takes messages on every rank, `stopping` says on rank 0 whether to stop.

    `class_latents` are those of the subject before, and become this one's.

    `leaving`, which every rank asks as often, says on all whether the machine of one will be taken away: then a
    checkpoint is written, from which others go on. So it is after SIGTERM, and this process ends. There may be fewer
    workers than `cluster.num_workers` says, or more again: they share the same global batch.

    Raises Diverged when the loss stops being a number, Stopped when told to stop, after a checkpoint.
    """
    from torch import distributed as dist

    from dreambooth.training.loop import fit
    from pipelines.worker.fidelity import Scoring

    task = replace(task, config=_shared(task.config, dist.get_world_size() if dist.is_initialized() else 1))
    config = task.config
    every = config.evaluation.every
    num_train_timesteps = len(model.schedule.alphas_cumprod)
    data = train_data(
        base, task, class_latents or ClassLatents(), num_train_timesteps=num_train_timesteps, device=device
    )
    engine = _engine(model, task, device)
    history = checkpoints.restore(engine)
    if engine.rank:
        history.scores.weights = None
    resumed_from = history.step
    scoring = Scoring(task, engine, device)
    leave = Leaving(leaving, lambda mine: _any_rank(engine, mine, device))
    workers = {"workers": engine.world_size, "asked": config.cluster.num_workers}
    tell({"kind": "phase", "phase": "training", "time": time.time(), "start": resumed_from} | workers)

    def on_step(step: int, metrics: "StepMetrics | None") -> None:
        history.step = step
        if metrics is not None:
            history.metrics.append(metrics.as_dict())
            tell({"kind": "step", "metrics": metrics.as_dict()})
        last = step == config.train.max_train_steps
        if every is not None and (last or step % every == 0):
            tell({"kind": "score", "score": scoring.measure(step, history.scores).as_dict()})
            if not last and history.scores.ends(config.train.stop_after):
                raise _NoLongerRising
        stop = stopping is not None and _any_rank(engine, stopping(), device)
        noticed = not last and leave.noticed(step)
        if not last and (stop or noticed or step % config.train.checkpoint_every == 0):
            began_saving = time.perf_counter()
            checkpoints.save(engine, history)
            tell({"kind": "checkpoint", "step": step, "seconds": time.perf_counter() - began_saving})
            leave.go()
        if stop and not last:
            raise Stopped(f"stopped after step {step}")
        if not last and config.train.validate_every and step % config.train.validate_every == 0:
            state = engine.state_dict()
            if engine.rank == 0:
                tell({"kind": "samples", "step": step, "images": _validation_samples(base, state, config, device)})

    aside = _Timed(on_step)  # checkpoints, samples and scores are no steps
    began = time.perf_counter()
    try:
        with leave.while_training(), suppress(_NoLongerRising):
            fit(engine, data, config.train, start=resumed_from, on_step=aside)
        seconds = time.perf_counter() - began - aside.seconds
        peaks, resident = from_all_ranks(engine, _peak_memory(device)), from_all_ranks(engine, _resident_memory())
        exported, state = _exported(engine, history, config)
    finally:
        engine.close()
    training_record = {
        "history": history.metrics,
        "scores": [score.as_dict() for score in history.scores.measured],
        "steps": history.step,
        "exported_step": exported,
        "peak_memory_bytes": peaks,
        "resident_memory_bytes": resident,
        "steps_per_second": (history.step - resumed_from) / seconds,
        "resumed_from": resumed_from,
    }
    return FineTuned(state=state, record=training_record)


def _shared(config: DreamBoothConfig, workers: int) -> DreamBoothConfig:
    """The settings with the micro steps of a global batch shared by as many workers as there are."""
    micro_steps = config.cluster.num_workers * config.train.gradient_accumulation_steps
    if micro_steps % workers:
        raise ValueError(f"{workers} workers can't share {micro_steps} micro steps evenly")
    train = config.train.model_copy(update={"gradient_accumulation_steps": micro_steps // workers})
    return config.model_copy(update={"train": train})


class _Timed:
    """Calls a function and adds up the seconds that it takes."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> None:
        began = time.perf_counter()
        try:
            self._function(*arguments)
        finally:
            self.seconds += time.perf_counter() - began


class _NoLongerRising(Exception):
    """The score has not risen for as many measurements as the training waits for."""


def _exported(engine: Any, history: History, config: DreamBoothConfig) -> tuple[int, Mapping[str, Any]]:
    """The step whose weights are exported, and those weights (on rank 0); every rank has to call it."""
    best = history.scores.best
    if config.train.keep == "last" or best is None or best.step == history.step:
        return history.step, engine.state_dict()
    return best.step, history.scores.weights or {}


def publish_result(base: BaseModel, tuned: FineTuned, task: TrainTask) -> Manifest:
    """Write the record and publish the model, once it was read again and is what was trained; on rank 0."""
    began = time.perf_counter()
    write_json(join(task.config.run_uri, "training", f"{task.key}.json"), tuned.record)
    manifest = _export(base, tuned.state, task, step=tuned.record["exported_step"])
    seconds = time.perf_counter() - began
    record("dreambooth_publish_seconds", seconds)
    log("published", uri=manifest.uri, seconds=round(seconds, 3))
    return manifest


def autocast(config: DreamBoothConfig, device: str) -> bool:
    """Whether matrix products run in bf16."""
    import torch

    if config.train.mixed_precision == "auto":
        return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.train.mixed_precision == "bf16"


def _any_rank(engine: Any, here: bool, device: str) -> bool:
    """Whether something is so on one rank, on every rank at the same step."""
    import torch

    if engine.world_size == 1:
        return here
    return bool(engine.mean(torch.tensor([float(here)], device=device)).item() > 0)


def _engine(model: Any, task: TrainTask, device: str) -> Any:
    if task.engine == "torch":
        from dreambooth.training.engine import TorchEngine

        return TorchEngine(model, task.config.train, device)
    from pipelines.worker.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, task.config.train, task.config.zero, device)


def _validation_samples(base: BaseModel, state: dict[str, Any], config: DreamBoothConfig, device: str) -> list[bytes]:
    """One picture per evaluation prompt from the weights as they are, as PNG."""
    import torch

    from dreambooth.sampling.sampler import load_trained, sample

    evaluation = config.evaluation
    prompts = evaluation.prompts_of(config.subject, config.prompts)
    pipeline = load_trained(base.directory, state, device=device, dtype=torch.float32)
    images = sample(
        pipeline,
        prompts,
        [evaluation.seed] * len(prompts),
        num_inference_steps=evaluation.num_inference_steps,
        guidance_scale=evaluation.guidance_scale,
        height=config.images.resolution,
        width=config.images.resolution,
    )
    return [png_bytes(image) for image in images]


def _export(base: BaseModel, state: Mapping[str, Any], task: TrainTask, *, step: int) -> Manifest:
    """Publish the fine-tuned pipeline, once it was read again and is what was trained."""
    import torch

    from dreambooth.models.export import export_pipeline, verify_export

    config = task.config
    dtype = getattr(torch, config.storage.dtype)
    with tempfile.TemporaryDirectory(prefix="dreambooth-export-") as folder:
        export_pipeline(base.directory, state, Path(folder, "model"), dtype=dtype, resolution=config.images.resolution)
        metadata = {
            "key": task.key,
            "subject": config.subject.name,
            "identifier": config.subject.identifier,
            "class_noun": config.subject.class_noun,
            "base_model": shown(config.base_model),
            "base_hash": task.base_hash,
            "data_hash": task.data_hash,
            "prior_set": task.prior_set.key if task.prior_set else None,
            "num_inference_steps": config.evaluation.num_inference_steps,
            "guidance_scale": config.evaluation.guidance_scale,
            "resolution": config.images.resolution,
            "step": step,
        }

        def verify(manifest: Manifest) -> None:
            with opened(manifest) as directory:
                verify_export(directory, base.directory, state, dtype=dtype)

        return publish(Path(folder, "model"), join(config.run_uri, "model"), metadata=metadata, verify=verify)


def _peak_memory(device: str) -> int:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _resident_memory() -> int:
    """Bytes of main memory that this process holds; 0 where the system doesn't tell as Linux does."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0
