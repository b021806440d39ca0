"""One subject's fine-tuning as a Ray Train run: what runs on every worker."""

import tempfile
import time
from pathlib import Path
from typing import Any

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.errors import Diverged
from dreambooth.models.base_model import resolve_base_model
from pipelines.cluster.collector import collect_less_garbage
from pipelines.cluster.logs import about, to_stderr
from pipelines.cluster.metrics import observed
from pipelines.cluster.preemption import notice
from pipelines.storage.publications import join, write_json
from pipelines.tasks import TrainTask
from pipelines.worker.fine_tune import History, autocast, fine_tune, publish_result


def train_worker(loop_config: dict[str, Any]) -> None:
    """Load, restore, fit, export."""
    collect_less_garbage()
    to_stderr()
    with about(lane="run", subject=loop_config["task"].config.subject.name):
        _train(loop_config["task"], loop_config["events"])


def _train(task: TrainTask, events: Any) -> None:
    import ray.train
    import ray.train.collective
    import ray.train.torch
    import torch

    from dreambooth.quiet import quiet
    from dreambooth.training.model import load_model

    quiet()
    config = task.config
    device = str(ray.train.torch.get_device())
    if device == "cpu":
        torch.set_num_threads(config.cluster.cpus_per_worker)
    rank = ray.train.get_context().get_world_rank()
    tell = observed(events.put, lane="run") if rank == 0 else lambda message: None
    tell({"kind": "phase", "phase": "loading", "time": time.time()})

    base = resolve_base_model(config.base_model, config.revision)
    if base.hash != task.base_hash:
        raise RuntimeError(f"the base model here has hash {base.hash}, the driver's has {task.base_hash}; use one copy")
    model = load_model(base.directory, config, autocast=autocast(config, device))
    attempt = ray.train.collective.broadcast_from_rank_zero(f"{time.time_ns():x}")
    try:
        tuned = fine_tune(task, base, model, device, _ReportedCheckpoints(rank, attempt), tell, leaving=notice())
    except Diverged as error:
        # Every rank sees the same mean loss and ends here; starting the workers again would only repeat it.
        if rank == 0:
            write_json(diverged_uri(config, task.key), str(error))
        return
    tell({"kind": "phase", "phase": "exporting", "time": time.time()})
    if rank == 0:
        publish_result(base, tuned, task)


def diverged_uri(config: DreamBoothConfig, key: str) -> str:
    """Where a run whose loss stopped being a number says so."""
    return join(config.run_uri, "training", f"{key}.diverged.json")


class _ReportedCheckpoints:
    """Checkpoints that Ray Train keeps for the run."""

    def __init__(self, rank: int, attempt: str) -> None:
        self._rank = rank
        self._attempt = attempt

    def restore(self, engine: Any) -> History:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return History()
        with checkpoint.as_directory() as folder:
            engine.load(Path(folder))
            return History.load(Path(folder))

    def save(self, engine: Any, history: History) -> None:
        import ray.train

        with tempfile.TemporaryDirectory(prefix="dreambooth-checkpoint-") as folder:
            engine.save(Path(folder))
            if self._rank == 0:
                history.save(Path(folder))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            # A name used by an attempt that died could hold its stale files, so every attempt has names of its own.
            name = f"step-{history.step:08d}-{self._attempt}"
            ray.train.report({"step": history.step}, checkpoint=checkpoint, checkpoint_dir_name=name)
