"""Steps per second of `fit` and of a bare loop, which take turns in one process: machines are noisy."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.data.batches import ImageSet, TrainingData
from dreambooth.data.latents import LatentCache
from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.families import Tensors, family_of
from dreambooth.training.engine import Engine
from dreambooth.training.loop import fit
from dreambooth.training.model import DreamBoothModel
from dreambooth.training.optimizer import build_optimizer


def random_data(base: Path, resolution: int, instance_ids: Tensors, class_ids: Tensors) -> TrainingData:
    """Five instance images and fifty class images of `resolution` pixels, as random latents."""

    family, shape = family_of(base), BaseSettings(base).x0_shape(resolution)

    def images(count: int, text: Tensors) -> ImageSet:
        cache = LatentCache(mean=torch.randn(count, *shape), std=torch.full((count, *shape), 0.1))
        conditions = family.conditions([(resolution, resolution)] * count, [(0, 0)] * count, (resolution, resolution))
        return ImageSet(latents=cache, text=text, conditions=conditions)

    return TrainingData(
        family=family,
        process=family.process(base, shape),
        instance=images(5, instance_ids),
        class_=images(50, class_ids),
        seed=0,
    )


def bare_loop(
    model: DreamBoothModel, data: TrainingData, settings: DreamBoothConfig, device: str = "cpu"
) -> Callable[[], None]:
    """The same model, batch and optimizer as `fit` has, and nothing else."""
    optimizer = build_optimizer(model, settings.train)
    batch = data.batch(range(1)).to(device)

    def run() -> None:
        for _ in range(settings.train.max_train_steps):
            model(*batch).total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def fitted(engine: Engine, data: TrainingData, settings: DreamBoothConfig) -> Callable[[], None]:
    """`fit`, from its first step to its last."""
    return lambda: fit(engine, data, settings.train)


def take_turns(steps: int, rounds: int, *runs: Callable[[], None]) -> list[list[float]]:
    """Steps per second of each, round by round; a first round only warms up."""
    for run in runs:
        run()
    return [list(rates) for rates in zip(*([_rate(steps, run) for run in runs] for _ in range(rounds)), strict=True)]


def efficiency(bare: list[float], ours: list[float]) -> dict[str, float]:
    """Efficiency of `fit` over the bare loop, by the median of the rounds."""
    return {
        "loop_efficiency": round(statistics.median(o / b for o, b in zip(ours, bare, strict=True)), 3),
        "bare_steps_per_second": round(statistics.median(bare), 2),
        "fit_steps_per_second": round(statistics.median(ours), 2),
    }


def _rate(steps: int, run: Callable[[], None]) -> float:
    _wait()
    began = time.perf_counter()
    run()
    _wait()
    return steps / (time.perf_counter() - began)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
