"""One subject's fine-tuning as a Ray Train run: what runs on every worker."""

import logging
import time
from typing import Any

from dreambooth.base_model import resolve_base_model
from dreambooth.errors import Diverged
from pipelines.collector import collect_less_garbage
from pipelines.fine_tune import autocast, fine_tune, publish_result
from pipelines.logs import about, log, to_stderr
from pipelines.metrics import observed
from pipelines.preemption import notice
from pipelines.storage_faults import StorageFull
from pipelines.stored_checkpoints import checkpoints_of
from pipelines.tasks import TrainTask


def train_worker(loop_config: dict[str, Any]) -> str | None:
    """Load, restore, fit, export; says, on every rank, why it ended where starting again would only repeat it."""
    collect_less_garbage()
    to_stderr()
    with about(lane="run", subject=loop_config["task"].config.subject.name):
        return _train(loop_config["task"], loop_config["events"])


def _train(task: TrainTask, events: Any) -> str | None:
    import ray.train
    import ray.train.torch
    import torch

    from dreambooth.model import load_model
    from dreambooth.quiet import quiet

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

    def warn(text: str) -> None:
        if rank == 0:
            log("warning", level=logging.WARNING, text=text)
            tell({"kind": "warning", "text": text})

    try:
        tuned = fine_tune(task, base, model, device, checkpoints_of(task, warn), tell, leaving=notice())
    except (Diverged, StorageFull) as error:
        return str(error)
    tell({"kind": "phase", "phase": "exporting", "time": time.time()})
    try:
        if rank == 0:
            publish_result(base, tuned, task)
    except StorageFull as error:
        return str(error)
    return None
