"""The Engine protocol, and TorchEngine, the reference.

An engine owns backward and step: division by the accumulation steps, averages over ranks, clipping, the learning rate,
the moving average, and their checkpoints. The loop owns everything else.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from dreambooth.config.train import TrainConfig
from dreambooth.data.batches import Batch
from dreambooth.errors import Diverged
from dreambooth.training.checkpoint_files import CheckpointFile, save_files
from dreambooth.training.ema import Ema
from dreambooth.training.fused_backward import FusedBackward
from dreambooth.training.losses import Losses
from dreambooth.training.model import DreamBoothModel
from dreambooth.training.optimizer import build_lr_scheduler, build_optimizer, moments
from dreambooth.training.snapshot import Snapshot, Snapshots


class Engine(Protocol):
    """What `fit` requires of an engine."""

    rank: int
    world_size: int
    device: str

    def __call__(self, batch: Batch) -> Losses:
        """Losses of this rank's batch."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, divided by the accumulation steps."""

    def step(self) -> None:
        """At the accumulation boundary: average over ranks, clip, update, schedule. Between: nothing."""

    def diverged_at(self, *, wait: bool = True) -> int | None:
        """This process's first step with a gradient that isn't finite, the same on every rank; None if there is none.

        With `wait` False also None while only the device knows.
        """

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over all ranks."""

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping."""

    @property
    def learning_rates(self) -> Sequence[float]:
        """Learning rates of the denoiser and, where it is trained, the text encoder."""

    def state_dict(self, *, averaged: bool = True) -> dict[str, Tensor]:
        """The exported parameters, unsharded, fp32, on the CPU of rank 0; empty elsewhere. Collective.

        They are the moving average where there is one, unless `averaged` is False. Raises Diverged, on every
        rank, if a gradient, weight or moment isn't finite.
        """

    def checkpoint_files(self) -> list[CheckpointFile]:
        """This rank's files of a checkpoint, of the engine's own tensors. Collective."""

    def snapshot(self) -> Snapshot:
        """A copy of `checkpoint_files` for a thread to make, while this one goes on. Collective.

        Raises Diverged if a gradient wasn't finite, and when it is made if one of this rank's tensors isn't.
        """

    def reserve_snapshot(self) -> None:
        """Reserve host memory for snapshots, in a thread. Collective. Call after the first step."""

    @property
    def snapshot_seconds_waited(self) -> float:
        """Seconds that the engine waited in all for snapshots to be made."""

    def save(self, directory: Path) -> None:
        """Write `checkpoint_files` below a directory. Collective. Raises Diverged as `state_dict` does."""

    def load(self, directory: Path) -> None:
        """Load a checkpoint of `save`, made at an accumulation boundary by any number of ranks."""

    def close(self) -> None:
        """Free what the engine holds, so that the process can train another model."""


def diverged(what: str, config: TrainConfig) -> Diverged:
    """The error for values that aren't finite, with the settings to lower."""
    norm = config.max_grad_norm
    clipping = "set train.max_grad_norm (there is none)" if norm is None else f"train.max_grad_norm (it is {norm})"
    return Diverged(f"{what}; lower train.learning_rate (it is {config.learning_rate}) or {clipping}")


def check_finite(engine: Engine, tensors: Iterable[Tensor], steps: int, config: TrainConfig) -> None:
    """Raise Diverged, on every rank, if a gradient so far or one of this rank's `tensors` isn't finite.

    Collective: call it on every rank. ZeRO skips a step whose gradient isn't finite, and a moment that overflows
    freezes its weight for ever, both silently.
    """
    check_gradients(engine, config)
    broken = torch.tensor(float(not _all_finite(tensors)), device=engine.device)
    if float(engine.mean(broken)) > 0:
        raise diverged(f"weights or their moments are not finite after step {steps}", config)


def check_gradients(engine: Engine, config: TrainConfig) -> None:
    """Raise Diverged, on every rank, if a gradient so far isn't finite."""
    if (step := engine.diverged_at()) is not None:
        raise diverged(f"the gradient is not finite at step {step}", config)


def check_tensors(tensors: Iterable[Tensor], steps: int, config: TrainConfig) -> None:
    """Raise Diverged if one of this rank's tensors isn't finite."""
    if not _all_finite(tensors):
        raise diverged(f"weights or their moments are not finite after step {steps}", config)


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    # Least and largest value need no copy of a tensor, and are NaN where one of its values is; torch finds them some
    # thirty times as fast as the largest absolute value (2 cores, torch 2.13).
    ends = [torch.stack(torch.aminmax(tensor.detach())).cpu() for tensor in tensors if tensor.numel()]
    return all(bool(end.isfinite().all()) for end in ends)


def clip(parameters: Sequence[Tensor], config: TrainConfig) -> Tensor:
    """Scale gradients down to the largest norm, and return their norm before."""
    largest = math.inf if config.max_grad_norm is None else config.max_grad_norm
    return torch.nn.utils.clip_grad_norm_(parameters, largest)


class SavesCheckpoints(Engine):
    """How an engine's `checkpoint_files` are written: at once, or from a snapshot beside the training."""

    config: TrainConfig
    _snapshots: Snapshots

    @property
    @abstractmethod
    def _steps(self) -> int:
        """Steps made."""

    @abstractmethod
    def _tensors(self) -> list[Tensor]:
        """This rank's weights and moments, which have to be finite."""

    def _check(self) -> None:
        check_finite(self, self._tensors(), self._steps, self.config)

    def snapshot(self) -> Snapshot:
        """A snapshot of this rank's files."""
        check_gradients(self, self.config)
        check = partial(check_tensors, self._tensors(), self._steps, self.config)
        return self._snapshots.take(self.checkpoint_files(), check)

    @property
    def snapshot_seconds_waited(self) -> float:
        """Seconds that updates waited for snapshots."""
        return self._snapshots.seconds_waited

    def reserve_snapshot(self) -> None:
        """Reserve memory for a snapshot of this rank's files."""
        self._snapshots.reserve(self.checkpoint_files())

    def save(self, directory: Path) -> None:
        """Write this rank's files below a directory."""
        self._check()
        save_files(self.checkpoint_files(), directory)


class TorchEngine(SavesCheckpoints):
    """Plain PyTorch: fp32 parameters, gradients averaged over ranks at the accumulation boundary."""

    def __init__(self, model: DreamBoothModel, config: TrainConfig, device: str = "cpu") -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.device = device
        self.model = model.to(device)
        model.process = model.process.to(device)
        self.config = config
        self.optimizer = build_optimizer(model, config)
        self.lr_scheduler = build_lr_scheduler(self.optimizer, config)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.ema = None if config.ema_decay is None else Ema(self.parameters, config.ema_decay)
        if config.fused_backward and self.world_size > 1:
            raise ValueError(f"train.fused_backward averages no gradients, but there are {self.world_size} ranks")
        self._fused = FusedBackward(self.optimizer) if config.fused_backward else None
        self._snapshots = Snapshots(device)
        self._micro_steps = 0
        self._grad_norm = torch.zeros(())
        self._diverged_at = torch.zeros((), dtype=torch.long, device=device)

    def __call__(self, batch: Batch) -> Losses:
        """Losses of this rank's batch."""
        losses: Losses = self.model(*batch.to(self.device))
        return losses

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, divided by the accumulation steps."""
        if self._fused is not None:
            self._snapshots.settle()
        (loss / self.config.gradient_accumulation_steps).backward()
        self._micro_steps += 1

    def step(self) -> None:
        """Update at the accumulation boundary."""
        if self._micro_steps % self.config.gradient_accumulation_steps:
            return
        if self.world_size > 1:
            self._average_gradients()
        self._grad_norm = clip(self.parameters, self.config) if self._fused is None else self._fused.norm()
        # Kept on the device: reading it at every step would stall the device.
        first = (self._diverged_at == 0) & ~self._grad_norm.isfinite()
        self._diverged_at = torch.where(first, self._steps + 1, self._diverged_at)
        self._snapshots.settle()
        if self._fused is None:
            self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()

    def _average_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world_size
        for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(averaged.view_as(gradient))

    @property
    def _steps(self) -> int:
        return int(self.lr_scheduler.last_epoch)

    def diverged_at(self, *, wait: bool = True) -> int | None:
        """The first step with a gradient that isn't finite."""
        return (int(self._diverged_at) or None) if wait or self.device == "cpu" else None

    def _tensors(self) -> list[Tensor]:
        return [*self.parameters, *moments(self.optimizer)]

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values / self.world_size

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping."""
        return float(self._grad_norm)

    @property
    def learning_rates(self) -> Sequence[float]:
        """Learning rates of the denoiser and, where it is trained, the text encoder."""
        return [float(rate) for rate in self.lr_scheduler.get_last_lr()]

    def state_dict(self, *, averaged: bool = True) -> dict[str, Tensor]:
        """The trained parameters, or their moving average."""
        self._check()
        self._snapshots.settle()
        if self.rank:
            return {}
        with self.ema.applied() if self.ema is not None and averaged else nullcontext():
            state = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self.model.named_parameters()}
        return self.model.exported(state)

    def checkpoint_files(self) -> list[CheckpointFile]:
        """Parameters, optimizer and schedule, and the moving average; ranks hold the same, so rank 0 has all files."""
        if self.rank:
            return []
        state = {
            "model": self._unfrozen_state(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema_steps": self.ema.steps if self.ema else 0,
        }
        averages = [] if self.ema is None else [self.ema.file("ema.safetensors")]
        return [CheckpointFile(name="engine.pt", content=state), *averages]

    def load(self, directory: Path) -> None:
        """Load a checkpoint of `save`."""
        self._snapshots.settle()
        # Into host memory: a device that trains has no room for all of it a second time.
        state = torch.load(directory / "engine.pt", map_location="cpu", weights_only=True)
        self.model.load_state_dict(self.model.state_dict() | state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema is not None:
            self.ema.load(directory / "ema.safetensors", state["ema_steps"])

    def _unfrozen_state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint: all but frozen weights, which are loaded with the base model."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}

    def close(self) -> None:
        """Leave the model as it was: without updates in its backward pass."""
        self._snapshots.close()
        if self._fused is not None:
            self._fused.remove()
