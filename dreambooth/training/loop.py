"""The training loop, without Ray, DeepSpeed or MLflow: it takes an engine, and `on_step` does the rest."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from dreambooth.config.train import TrainConfig
from dreambooth.data.batches import TrainingData, pairs_of
from dreambooth.training.engine import Engine, diverged


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step: losses are means over the global batch, `step` counts from 1."""

    step: int
    loss: float
    instance_loss: float
    prior_loss: float
    learning_rate: float
    text_encoder_learning_rate: float
    grad_norm: float
    images_per_second: float

    def as_dict(self) -> dict[str, float]:
        """Values for a logger."""
        return asdict(self)


def fit(
    engine: Engine,
    data: TrainingData,
    config: TrainConfig,
    *,
    start: int = 0,
    on_step: Callable[[int, StepMetrics | None], None] = lambda step, metrics: None,
) -> None:
    """Train from step `start` to `config.max_train_steps`.

    `on_step(step, metrics)` is called after every optimizer step, on every rank, with metrics on every `log_every`-th
    step (and before a checkpoint) and None between: metrics synchronize the ranks. Raises Diverged if a loss or
    gradient isn't finite: after that step if the engine knows at once, else before the next `on_step` with metrics.
    """
    images_per_step = config.micro_batch_size * config.gradient_accumulation_steps * engine.world_size
    images_per_step *= 1 if data.class_ is None else 2
    began, logged = time.perf_counter(), start
    for step in range(start, config.max_train_steps):
        sums, learning_rates = torch.zeros(3, device=engine.device), engine.learning_rates
        for micro_step in range(config.gradient_accumulation_steps):
            pairs = pairs_of(
                step,
                micro_step,
                engine.rank,
                micro_batch_size=config.micro_batch_size,
                accumulation=config.gradient_accumulation_steps,
                world_size=engine.world_size,
            )
            losses = engine(data.batch(pairs))
            engine.backward(losses.total)
            engine.step()
            sums = sums + torch.stack([loss.detach() for loss in losses])
        metrics = None
        # Before a checkpoint too, so that none is written of a run that diverged.
        wanted = (step + 1) % config.log_every == 0 or (step + 1) % config.checkpoint_every == 0
        if wanted or step + 1 == config.max_train_steps or engine.diverged_at(wait=False) is not None:
            total, instance, prior = engine.mean(sums / config.gradient_accumulation_steps).tolist()
            now = time.perf_counter()
            metrics = StepMetrics(
                step=step + 1,
                loss=total,
                instance_loss=instance,
                prior_loss=prior,
                learning_rate=learning_rates[0],
                text_encoder_learning_rate=learning_rates[1]
                if data.runs_text_encoders and len(learning_rates) > 1
                else 0.0,
                grad_norm=engine.grad_norm,
                images_per_second=images_per_step * (step + 1 - logged) / (now - began),
            )
            began, logged = now, step + 1
            at = engine.diverged_at()
            if at is not None and at <= step:
                raise diverged(f"the gradient is not finite at step {at}", config)
            if at is not None or not math.isfinite(total):
                norm = metrics.grad_norm
                raise diverged(f"the loss is {total} and its gradient's norm {norm} at step {step + 1}", config)
        on_step(step + 1, metrics)
