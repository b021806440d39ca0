"""One subject's fine-tuning as a Ray Train run: what runs on every worker."""

import json
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreambooth.base_model import BaseModel, resolve_base_model
from dreambooth.config import DreamBoothConfig
from dreambooth.images import InstanceImage, png_bytes
from dreambooth.training import Diverged, StepMetrics
from pipelines.prior_stage import PriorSet
from pipelines.storage import Manifest, fetch, join, local_directory, publish, read_manifest, write_json

_PROGRESS = "progress.json"


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What a worker is told: plain data only."""

    config: DreamBoothConfig
    images: tuple[InstanceImage, ...]
    prior_set: PriorSet | None
    engine: str
    key: str
    data_hash: str
    base_hash: str


@dataclass(kw_only=True)
class _Progress:
    """Where a run stands; kept in every checkpoint, so that a resumed run ends with the whole history."""

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def train_worker(loop_config: dict[str, Any]) -> None:
    """Load, restore, fit, export."""
    import ray.train
    import ray.train.collective
    import ray.train.torch
    import torch

    from dreambooth.model import load_model
    from dreambooth.quiet import quiet
    from dreambooth.training import fit

    quiet()
    task: TrainTask = loop_config["task"]
    events = loop_config["events"]
    config = task.config
    device = str(ray.train.torch.get_device())
    if device == "cpu":
        torch.set_num_threads(config.cluster.cpus_per_worker)
    rank = ray.train.get_context().get_world_rank()
    # Telling never waits for the driver.
    tell = events.actor.put_nowait.remote if rank == 0 else lambda message: None
    tell({"kind": "phase", "phase": "loading", "time": time.time()})

    base = resolve_base_model(config.base_model, config.revision)
    if base.hash != task.base_hash:
        raise RuntimeError(f"the base model here has hash {base.hash}, the driver's has {task.base_hash}; use one copy")
    model = load_model(base.directory, config, autocast=_autocast(config, device))
    data = _data(base, task, len(model.schedule.alphas_cumprod), device)
    engine = _engine(model, task, device)
    progress = _restore(engine)
    attempt = ray.train.collective.broadcast_from_rank_zero(f"{time.time_ns():x}")
    resumed_from = progress.step
    tell({"kind": "phase", "phase": "training", "time": time.time(), "start": progress.step})

    def on_step(step: int, metrics: StepMetrics | None) -> None:
        progress.step = step
        if metrics is not None:
            progress.history.append(metrics.as_dict())
            tell({"kind": "step", "metrics": metrics.as_dict()})
        last = step == config.train.max_train_steps
        if not last and step % config.train.checkpoint_every == 0:
            _checkpoint(engine, progress, f"step-{step:08d}-{attempt}", rank)
            tell({"kind": "checkpoint", "step": step})
        if not last and config.train.validate_every and step % config.train.validate_every == 0:
            state = engine.state_dict()
            if rank == 0:
                tell({"kind": "samples", "step": step, "images": _validation_samples(base, state, config, device)})

    began = time.perf_counter()
    try:
        fit(engine, data, config.train, start=progress.step, on_step=on_step)
    except Diverged as error:
        # Every rank sees the same mean loss and ends here; starting the workers again would only repeat it.
        if rank == 0:
            write_json(diverged_uri(config, task.key), str(error))
        return
    seconds = time.perf_counter() - began
    tell({"kind": "phase", "phase": "exporting", "time": time.time()})
    peaks = _gather(_peak_memory(device))
    state = engine.state_dict()
    if rank == 0:
        record = {
            "history": progress.history,
            "peak_memory_bytes": peaks,
            "steps_per_second": (config.train.max_train_steps - resumed_from) / seconds,
            "resumed_from": resumed_from,
        }
        write_json(join(config.run_uri, "training", f"{task.key}.json"), record)
        _export(base, state, task)


def diverged_uri(config: DreamBoothConfig, key: str) -> str:
    """Where a run whose loss stopped being a number says so."""
    return join(config.run_uri, "training", f"{key}.diverged.json")


def _autocast(config: DreamBoothConfig, device: str) -> bool:
    import torch

    if config.train.mixed_precision == "auto":
        return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.train.mixed_precision == "bf16"


def _data(base: BaseModel, task: TrainTask, num_train_timesteps: int, device: str) -> Any:
    from PIL import Image

    from dreambooth.data import prepare_data
    from dreambooth.prior import image_name

    class_images = []
    with tempfile.TemporaryDirectory(prefix="dreambooth-prior-") as folder:
        if task.prior_set is not None:
            manifest = read_manifest(task.prior_set.uri)
            directory = local_directory(manifest) or fetch(manifest, Path(folder))
            for index in range(task.prior_set.count):
                with Image.open(directory / image_name(index)) as image:
                    class_images.append(image.convert("RGB"))
    return prepare_data(
        base.directory, task.config, task.images, class_images, num_train_timesteps=num_train_timesteps, device=device
    )


def _engine(model: Any, task: TrainTask, device: str) -> Any:
    if task.engine == "torch":
        from dreambooth.engine import TorchEngine

        return TorchEngine(model, task.config.train, device)
    from pipelines.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, task.config.train, task.config.zero, device)


def _restore(engine: Any) -> _Progress:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return _Progress()
    with checkpoint.as_directory() as folder:
        engine.load(Path(folder))
        return _Progress(**json.loads(Path(folder, _PROGRESS).read_text()))


def _checkpoint(engine: Any, progress: _Progress, name: str, rank: int) -> None:
    import ray.train

    with tempfile.TemporaryDirectory(prefix="dreambooth-checkpoint-") as folder:
        engine.save(Path(folder))
        if rank == 0:
            Path(folder, _PROGRESS).write_text(json.dumps({"step": progress.step, "history": progress.history}))
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        # A name used by an attempt that died could hold its stale files, so every attempt has names of its own.
        ray.train.report({"step": progress.step}, checkpoint=checkpoint, checkpoint_dir_name=name)


def _validation_samples(base: BaseModel, state: dict[str, Any], config: DreamBoothConfig, device: str) -> list[bytes]:
    """One picture per evaluation prompt from the weights as they are, as PNG."""
    import torch

    from dreambooth.export import load_trained
    from dreambooth.sampling import sample

    evaluation = config.evaluation
    prompts = evaluation.prompts_of(config.subject)
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


def _export(base: BaseModel, state: dict[str, Any], task: TrainTask) -> None:
    """Publish the fine-tuned pipeline, once it was read again and is what was trained."""
    import torch

    from dreambooth.export import export_pipeline, verify_export

    config = task.config
    dtype = getattr(torch, config.storage.dtype)
    with tempfile.TemporaryDirectory(prefix="dreambooth-export-") as folder:
        export_pipeline(base.directory, state, Path(folder, "model"), dtype=dtype)
        metadata = {
            "key": task.key,
            "subject": config.subject.name,
            "identifier": config.subject.identifier,
            "class_noun": config.subject.class_noun,
            "base_model": config.base_model,
            "base_hash": task.base_hash,
            "data_hash": task.data_hash,
            "prior_set": task.prior_set.key if task.prior_set else None,
            "num_inference_steps": config.evaluation.num_inference_steps,
            "guidance_scale": config.evaluation.guidance_scale,
        }

        def verify(manifest: Manifest) -> None:
            directory = local_directory(manifest) or fetch(manifest, Path(folder, "again"))
            verify_export(directory, base.directory, state, dtype=dtype)

        publish(Path(folder, "model"), join(config.run_uri, "model"), metadata=metadata, verify=verify)


def _peak_memory(device: str) -> int:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _gather(value: int) -> list[int]:
    from torch import distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
