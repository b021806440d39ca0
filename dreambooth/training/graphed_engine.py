"""TorchEngine with a step of fixed addresses, which a CUDA device replays as graphs.

A step launches some thousand kernels, each too short for the host to prepare the next meanwhile; a replay launches them
at once. So everything that changes from step to step is in tensors: the batch, learning rates, the number of the step.
There are two graphs, of forward and backward, and of the update. One of both would save one launch a step, and cost
more: micro steps are added up between the two, and a snapshot is copied during the first, as the second waits for it.

A lane keeps `FixedStep` from subject to subject: the next engine's weights, moments and averages take the places of the
last one's, and what is replayed is the first engine's. On a CPU its functions are called in place of a replay, so that
what a graph would miss of a later subject, a CPU misses as well.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from dreambooth.config.train import TrainConfig
from dreambooth.data.batches import Batch
from dreambooth.fixed_tensors import CaptureMemory, FixedTensors, Replayed
from dreambooth.training.engine import TorchEngine, clip
from dreambooth.training.losses import Losses
from dreambooth.training.model import DreamBoothModel


class FixedStep:
    """What engines of one base model and equal settings share: tensors, and the functions of them that are replayed.

    Those of the first engine; another one's where a tensor had to be allocated anew, or a batch has other tensors.
    """

    gradients: Replayed
    update: Replayed

    def __init__(self, device: str, say: Callable[[str], None] = lambda reason: None) -> None:
        self.tensors = FixedTensors(device)
        self._memory, self._say = CaptureMemory(device), say
        self._functions: _Functions | None = None
        self._of: list[object] = []

    def prepare(self, inputs: Sequence[str], make: "Callable[[], _Functions]") -> None:
        """Let `gradients` and `update` be functions of the present tensors, with inputs of these names."""
        wanted = [*inputs, self.tensors.allocations]
        if self._functions is not None and self._of == wanted:
            return
        self._functions, self._of = make(), wanted
        self.gradients = self._replayed(self._functions.gradients, "forward and backward")
        self.update = self._replayed(self._functions.update, "the update")

    def _replayed(self, function: Callable[[], None], name: str) -> Replayed:
        return Replayed(function, lambda reason: self._say(f"{name} can't be captured: {reason}"), self._memory)

    def forget_gradients(self) -> None:
        """Clear what a subject that ended within a step has left."""
        if self._functions is not None:
            self._functions.optimizer.zero_grad(set_to_none=False)


class GraphedEngine(TorchEngine):
    """TorchEngine for AdamW on one worker: the same results, from replays.

    `step` is a lane's, kept for the next engine of the same base model, settings, resolution and prior_loss_weight.
    One engine at a time may use it.
    """

    def __init__(self, model: DreamBoothModel, config: TrainConfig, device: str, step: FixedStep) -> None:
        self._fixed, keep = step, step.tensors.keep
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            tensor.data = keep(name, tensor.data)
        super().__init__(model, config, device)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # for the scheduler, which sees no update
        self._keep_state()
        self._rates = [keep(f"rate {i}", _rate(device)) for i, _ in enumerate(self.optimizer.param_groups)]
        self._weight = keep("weight", torch.zeros(()))
        self._number = keep("number", torch.zeros((), dtype=torch.long))
        self._losses = keep("losses", torch.zeros(3))
        self._grad_norm = keep("grad_norm", torch.zeros(()))
        self._diverged_at = keep("diverged_at", torch.zeros((), dtype=torch.long))
        step.forget_gradients()

    def _keep_state(self) -> None:
        """Put moments and averages into their places."""
        keep, state = self._fixed.tensors.keep, self.optimizer.state
        for i, parameter in enumerate(self.parameters):
            zeros = {"step": torch.zeros(()), "exp_avg": parameter.data, "exp_avg_sq": parameter.data}
            present = state[parameter] or {name: torch.zeros_like(like) for name, like in zeros.items()}
            state[parameter] = {name: keep(f"{name} {i}", present[name]) for name in zeros}
        if self.ema is not None:
            self.ema.averages = [keep(f"average {i}", average) for i, average in enumerate(self.ema.averages)]

    def __call__(self, batch: Batch) -> Losses:
        """Losses of this batch; `backward` computes their values."""
        names: list[str] = []

        def kept(name: str, part: Tensor) -> Tensor:
            names.append(name)
            # From pinned memory the device fetches it while the host goes on.
            return self._fixed.tensors.keep(name, part.pin_memory() if self.device.startswith("cuda") else part)

        inputs = batch.mapped(kept)
        self._fixed.prepare(names, lambda: _Functions(self, inputs))
        return Losses(*self._losses)

    def backward(self, loss: Tensor) -> None:
        """Compute the losses and accumulate their gradient, divided by the accumulation steps."""
        self._fixed.gradients()
        self._micro_steps += 1

    def step(self) -> None:
        """Update at the accumulation boundary."""
        if self._micro_steps % self.config.gradient_accumulation_steps:
            return
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._number.fill_(self._steps + 1)
        if self.ema is not None:
            self._weight.fill_(self.ema.next_weight())
        self._snapshots.settle()
        self._fixed.update()
        self.lr_scheduler.step()

    def load(self, directory: Path) -> None:
        """Load a checkpoint of `save`, of this engine or TorchEngine."""
        super().load(directory)
        self._keep_state()


class _Functions:
    """Forward and backward, and the update. Neither waits for the host nor reads what it may have changed."""

    def __init__(self, engine: GraphedEngine, inputs: Batch) -> None:
        self._model, self._config, self._inputs = engine.model, engine.config, inputs
        self._parameters, self._ema, self._weight = engine.parameters, engine.ema, engine._weight
        self._number, self._losses = engine._number, engine._losses
        self._grad_norm, self._diverged_at = engine._grad_norm, engine._diverged_at
        groups = zip(engine.optimizer.param_groups, engine._rates, strict=True)
        # The engine's own has the rates as numbers, for the schedule and the checkpoint.
        self.optimizer = torch.optim.AdamW(
            [{**group, "lr": rate, "capturable": True} for group, rate in groups], fused=True
        )
        self.optimizer.state = engine.optimizer.state

    def gradients(self) -> None:
        """Forward and backward."""
        # The cache of casts would keep a capture's memory.
        with torch.autocast(self._inputs.latents.device.type, enabled=False, cache_enabled=False):
            losses: Losses = self._model(*self._inputs)
            (losses.total / self._config.gradient_accumulation_steps).backward()
        self._losses.copy_(torch.stack([loss.detach() for loss in losses]))

    def update(self) -> None:
        """Clip, update, clear the gradients, average."""
        norm = clip(self._parameters, self._config)
        first = (self._diverged_at == 0) & ~norm.isfinite()
        self._diverged_at.copy_(torch.where(first, self._number, self._diverged_at))
        self._grad_norm.copy_(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        if self._ema is not None:
            self._ema.move(self._weight)


def _rate(device: str) -> Tensor:
    """A learning rate: the kernels of a CUDA device take fp32, those of a CPU any precision."""
    return torch.zeros((), dtype=torch.float32 if device.startswith("cuda") else torch.float64)
