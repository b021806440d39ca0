"""A step of every published model at full size on one GPU: steps per second, and its peak memory against the plan.

Random weights, one pair of its resolution, gradient checkpointing, matrix products in bf16, the family's defaults; with
the fewest changes of settings by which the plan fits the GPU, and not at all where it doesn't.
"""

import gc
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from full_size import random_batch, random_parts
from stamps import Figures

from dreambooth.models.base_model import BaseModel
from dreambooth.models.base_settings import BaseSettings
from dreambooth.training.engine import TorchEngine
from dreambooth.training.model import DreamBoothModel
from pipelines.plan.capacity import USABLE, on_gpus
from pipelines.plan.changes import Changed, for_the_same_gpus
from pipelines.plan.memory import peak_of
from pipelines.plan.published import published_models, published_plan
from pipelines.plan.run_plan import Plan

GIB = 2**30
WARM_UP, STEPS = 2, 10


def published_measures(device: str, seconds: float) -> dict[str, tuple[Callable[[], Figures], float]]:
    """A measure of each published model, and the most seconds that it may take."""
    return {base.address: (partial(_of_published, base, device), seconds) for base in published_models()}


def _of_published(base: BaseModel, device: str) -> Figures:
    room = int(torch.cuda.get_device_properties(device).total_memory * USABLE)
    changed = on_one_gpu(published_plan(base), room)
    return {"not_measured": changed} if isinstance(changed, str) else one_step(changed, device)


def on_one_gpu(plan: Plan, room: int) -> Changed | str:
    """The plan with the fewest changes by which plain PyTorch fits a GPU with this room in bytes, or that none does."""
    least = 0
    for changed in for_the_same_gpus(on_gpus(plan)):
        if changed.stages != (0,) or (changed.plan.config.train.optimizer == "adamw8bit" and not find_spec("torchao")):
            continue
        peak = peak_of(changed.plan, 0, 1)
        if peak <= room:
            return changed
        least = min(least or peak, peak)
    takes, has = f"it takes {least / GIB:.0f} GiB at least by its plan", f"this GPU has room for {room / GIB:.0f}"
    return f"{takes}, and {has}"


def one_step(changed: Changed, device: str, *, steps: int = STEPS) -> Figures:
    """Steps per second, and the peak of memory that they add, in GiB as planned and as measured."""
    plan, cuda = changed.plan, device.startswith("cuda")
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    engine = TorchEngine(bare_model(plan, device), plan.config.train, device)
    batch = random_batch(plan.base.directory, plan.config, pairs=1, resolution=_side(plan))
    try:
        seconds = [_timed(engine, batch, cuda) for _ in range(min(WARM_UP, steps) + steps)][-steps:]
        peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    finally:
        engine.close()
    return {
        "changes": ", ".join(changed.changes) or "none",
        "steps_per_second": round(steps / sum(seconds), 2),
        "planned_gib": round(peak_of(plan, 0, 1) / GIB, 2),
        "peak_gib": round(peak / GIB, 2),
    }


def bare_model(plan: Plan, device: str) -> DreamBoothModel:
    """What the plan trains, without vocabularies, which published configurations lack: so without an export's probe."""
    directory, train = plan.base.directory, plan.config.train
    parts = random_parts(directory, plan.config, device=device)
    settings = BaseSettings(directory)
    model = DreamBoothModel(
        family=parts.family,
        denoiser=parts.denoiser,
        text_encoders=parts.text_encoders,
        process=parts.family.process(directory, settings.x0_shape(_side(plan))),
        prior_loss_weight=plan.config.prior.prior_loss_weight,
        autocast=train.mixed_precision == "bf16",
    )
    parts.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    for text_encoder in parts.text_encoders.values():
        text_encoder.activation_checkpointing_enable()  # type: ignore[operator]
    model.train()
    parts.family.freeze(directory, model.denoiser, model.text_encoders)
    return model


def _side(plan: Plan) -> int:
    return int(plan.config.images.resolution or plan.base.resolution)


def _timed(engine: TorchEngine, batch: Any, cuda: bool) -> float:
    began = time.perf_counter()
    engine.backward(engine(batch).total)
    engine.step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
