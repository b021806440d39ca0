"""One stage of the pretraining: a loop that can be stopped at any time and goes on where it was.

A stage ends after so many steps or so many minutes, whichever comes first, and its learning rate comes down to zero
just then: on a GPU the steps run out, on a small CPU the time does.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from dreambooth.sampling.sampler import sampling_dtype

SAVE_EVERY_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """How long and how fast one model is trained."""

    name: str
    steps: int
    minutes: float
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 100
    ema_decay: float = 0.0

    def rate(self, progress: float, step: int) -> float:
        """The factor on the learning rate: linear warm-up over `warmup` steps, a cosine to zero at progress 1."""
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def autocast(device: torch.device) -> torch.autocast:
    """Matrix products in bf16, but on CPUs that would only emulate it, some eight times slower."""
    return torch.autocast(device.type, torch.bfloat16, enabled=sampling_dtype(device.type) is not torch.float32)


def fit(
    stage: Stage,
    module: nn.Module,
    loss_at: Callable[[int, float], Tensor],
    folder: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    optimizers: Sequence[Optimizer] = (),
    on_save: Callable[[nn.Module], None] | None = None,
    save_every_seconds: float = SAVE_EVERY_SECONDS,
) -> nn.Module:
    """Train `module` in place by `loss_at(step, progress)`; return it with its averaged (EMA) weights, if it keeps any.

    `optimizers` between them have all trainable parameters, each at its own peak rate; by default AdamW by the stage.
    The state lies in `folder`/<name>.pt and is picked up again by the next call. With `world_size` > 1 every process of
    the default group calls this with its own data, gradients are averaged over them, and rank 0 saves. `on_save` is
    called with the averaged module after each save but the last.
    """
    path = folder / f"{stage.name}.pt"
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizers = optimizers or (
        AdamW(parameters, lr=stage.learning_rate, betas=stage.betas, weight_decay=stage.weight_decay, foreach=True),
    )
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    averaged = [parameter.detach().clone() for parameter in parameters] if stage.ema_decay else []
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=parameters[0].device, weights_only=True)
        module.load_state_dict(state["module"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        averaged, step, spent = state["averaged"], state["step"], state["spent"]

    def save() -> None:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            state = {"module": module.state_dict(), "optimizers": [one.state_dict() for one in optimizers]}
            torch.save({**state, "averaged": averaged, "step": step, "spent": spent}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)

    def swap() -> None:
        for parameter, average in zip(parameters, averaged, strict=False):
            kept = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(kept)

    limit = 60 * stage.minutes
    bar = tqdm(total=stage.steps, initial=step, desc=stage.name, disable=rank > 0, mininterval=2, dynamic_ncols=True)
    smooth, saved, before = math.nan, time.monotonic(), time.monotonic()
    module.train()
    while True:
        clock = torch.tensor(spent)
        if world_size > 1:  # the processes must agree on the learning rate and on the end
            torch.distributed.broadcast(clock, src=0)
        progress = max(step / stage.steps, float(clock) / limit)
        if progress >= 1:
            break
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * stage.rate(progress, step)
        loss = loss_at(step, progress)
        loss.backward()
        if world_size > 1:
            _average_gradients(parameters, world_size)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if averaged:
            decay = min(stage.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(averaged, [parameter.detach() for parameter in parameters], 1 - decay)
        value = float(loss.detach())
        smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
        now = time.monotonic()
        spent, before = spent + now - before, now
        bar.update()
        bar.set_postfix(loss=f"{smooth:.4f}", minutes=f"{spent / 60:.1f}/{stage.minutes:.0f}", refresh=False)
        if now - saved > save_every_seconds:
            save()
            if on_save is not None and rank == 0:
                swap()
                on_save(module)
                swap()
                module.train()
            saved = time.monotonic()
    bar.close()
    save()
    swap()
    return module.eval()


def _average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    """One all-reduce over all gradients laid end to end."""
    gradients = [
        parameter.grad if parameter.grad is not None else torch.zeros_like(parameter) for parameter in parameters
    ]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / world_size
    torch.distributed.all_reduce(flat)
    for parameter, piece in zip(parameters, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        parameter.grad = piece.view_as(parameter)
