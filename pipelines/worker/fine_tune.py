"""Fine-tune one subject on one worker of a lane."""

import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.models.base_model import BaseModel
from pipelines.cluster.collectives import from_all_ranks
from pipelines.cluster.preemption import Leaving
from pipelines.cluster.processor import device_name
from pipelines.tasks import TrainTask
from pipelines.worker.checkpoint_hook import Checkpoint, Report
from pipelines.worker.graphs import Graphs
from pipelines.worker.history import Checkpoints, History
from pipelines.worker.hooks import Hooks, Leave, NoLongerRising, Record, Samples, Score
from pipelines.worker.train_data import ClassLatents, train_data

if TYPE_CHECKING:
    from dreambooth.data.frozen_text import FrozenTextEncoders
    from pipelines.worker.fidelity import FirstStage


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """The result: the exported parameters (on rank 0), and the training record for `find_result`.

    `unaveraged` are the last step's, where they are kept beside the moving average.
    """

    state: Mapping[str, Any]
    record: dict[str, Any]
    unaveraged: Mapping[str, Any] | None = None


def fine_tune(
    task: TrainTask,
    base: BaseModel,
    model: Any,
    device: str,
    checkpoints: Checkpoints,
    report: Report,
    stopping: Callable[[], bool] = lambda: False,
    leaving: Callable[[], bool] | None = None,
    class_latents: ClassLatents | None = None,
    text_encoders: "FrozenTextEncoders | None" = None,
    graphs: Graphs | None = None,
    first: "FirstStage | None" = None,
) -> FineTuned:
    """Restore, fit, gather. `report` takes messages on every rank; `stopping` is True on rank 0 to stop.

    `class_latents` holds the previous subject's, and is updated; so are frozen `text_encoders` of its base model, and
    `graphs`, its captured step. `first` is the trained stage whose pictures this one scales up.

    `leaving()` is collective: call it on every rank. True if any node is being preempted; then a checkpoint is written
    for others to resume from. After SIGTERM, too, and this process exits. The global batch is the same for any number
    of workers. Of a task that has a second stage, the last step's checkpoint is kept until both are published.

    Raises Diverged for a non-finite loss, Stopped after a checkpoint when asked to stop, StorageFull if there is no
    room for one.
    """
    from torch import distributed as dist

    from dreambooth.training.loop import fit

    task = replace(task, config=_shared(task.config, dist.get_world_size() if dist.is_initialized() else 1))
    config = task.config
    data = train_data(base, task, class_latents or ClassLatents(), text_encoders, device=device)
    engine = _engine(model, task, device, graphs or Graphs(), sizes=len(data.buckets))
    history = checkpoints.restore(engine)
    if engine.rank:
        history.scores.weights = None
    resumed_from = history.step

    def any_rank(here: bool) -> bool:
        return _any_rank(engine, here, device)

    checkpoint = Checkpoint(checkpoints, engine, history, config.train, report, any_rank)
    hooks = _hooks(
        task, base, engine, checkpoint, history, device, report, stopping, Leaving(leaving, any_rank), any_rank, first
    )
    workers = {"workers": engine.world_size, "asked": config.cluster.num_workers}
    report({"kind": "phase", "phase": "training", "time": time.time(), "start": resumed_from} | workers)
    began = time.perf_counter()
    try:
        if not history.scores.ends(config.train.stop_after):
            with suppress(NoLongerRising):
                fit(engine, data, config.train, start=resumed_from, on_step=hooks)
        if task.second is not None and history.step > resumed_from:
            checkpoint.save(history.step)
        checkpoint.settle()
        seconds = time.perf_counter() - began  # with checkpoints, scores and samples
        peaks, reserved, resident = zip(*from_all_ranks(engine, _memory(device)), strict=True)
        exported, state = _exported(engine, history, config)
        unaveraged = engine.state_dict(averaged=False) if config.train.keep_unaveraged else None
    finally:
        checkpoint.abandon()  # another attempt reads what it leaves
        engine.close()
    training_record = {
        "history": history.metrics,
        "scores": [score.as_dict() for score in history.scores.measured],
        "steps": history.step,
        "exported_step": exported,
        "peak_memory_bytes": list(peaks),
        "reserved_memory_bytes": list(reserved),
        "resident_memory_bytes": list(resident),
        "steps_per_second": (history.step - resumed_from) / seconds,
        "resumed_from": resumed_from,
        "device": device_name(device),
    }
    return FineTuned(state=state, record=training_record, unaveraged=unaveraged)


def _shared(config: DreamBoothConfig, workers: int) -> DreamBoothConfig:
    """The settings with a global batch's micro steps divided among the present workers."""
    micro_steps = config.cluster.num_workers * config.train.gradient_accumulation_steps
    if micro_steps % workers:
        raise ValueError(f"{workers} workers can't share {micro_steps} micro steps evenly")
    train = config.train.model_copy(update={"gradient_accumulation_steps": micro_steps // workers})
    return config.model_copy(update={"train": train})


def _hooks(
    task: TrainTask,
    base: BaseModel,
    engine: Any,
    checkpoint: Checkpoint,
    history: History,
    device: str,
    report: Report,
    stopping: Callable[[], bool],
    leaving: Leaving,
    any_rank: Callable[[bool], bool],
    first: "FirstStage | None",
) -> Hooks:
    """Hooks in order: those that may end training early come first."""
    from pipelines.worker.fidelity import Scoring

    config = task.config
    return Hooks(
        Record(history, report),
        Score(Scoring(task, engine, device, first), history, config, report),
        Leave(leaving, checkpoint, any_rank, config, stopping=stopping),
        checkpoint,
        Samples(base, engine, config, device, report),
    )


def _exported(engine: Any, history: History, config: DreamBoothConfig) -> tuple[int, Mapping[str, Any]]:
    """The exported step and its weights (on rank 0). Collective: call on every rank."""
    best = history.scores.best
    if config.train.keep == "last" or best is None or best.step == history.step:
        return history.step, engine.state_dict()
    return best.step, history.scores.weights or {}


def _any_rank(engine: Any, here: bool, device: str) -> bool:
    """True on every rank if `here` is True on any. Collective."""
    import torch

    if engine.world_size == 1:
        return here
    return bool(engine.mean(torch.tensor([float(here)], device=device)).item() > 0)


def _engine(model: Any, task: TrainTask, device: str, graphs: Graphs, *, sizes: int) -> Any:
    from torch import distributed as dist

    workers = dist.get_world_size() if dist.is_initialized() else 1
    if (graphed := graphs.engine(model, task, device, workers, sizes=sizes)) is not None:
        return graphed
    if task.engine == "torch":
        from dreambooth.training.engine import TorchEngine

        return TorchEngine(model, task.config.train, device)
    from pipelines.worker.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, task.config.train, task.config.zero, device)


def _memory(device: str) -> tuple[int, int | None, int]:
    """This process's peak, what PyTorch has reserved of a GPU for it at most (None: no GPU), and its resident bytes."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), _resident_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024, None, _resident_memory()


def _resident_memory() -> int:
    """Resident bytes of this process; 0 on systems without Linux's /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0
