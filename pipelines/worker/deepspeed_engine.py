"""DeepSpeed behind the Engine protocol: its configuration dict, and DeepSpeedEngine.

Model, optimizer, learning-rate schedule and loop are TorchEngine's; ZeRO shards weights, gradients and optimizer
states.
"""

import argparse
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from dreambooth.config.settings import ZeroConfig
from dreambooth.config.train import TrainConfig
from dreambooth.data.batches import Batch
from dreambooth.training.checkpoint_files import CheckpointFile
from dreambooth.training.ema import Ema
from dreambooth.training.engine import SavesCheckpoints
from dreambooth.training.losses import Losses
from dreambooth.training.model import DreamBoothModel
from dreambooth.training.optimizer import build_lr_scheduler, build_optimizer
from dreambooth.training.snapshot import Snapshots
from pipelines.worker.masters import ExactWeights, masters_of
from pipelines.worker.zero3 import gather_by_block, partition

_TAG = "zero"
_ROOT = "checkpoint"
"""A folder that DeepSpeed wants named, but which is never made."""
REDUCE_BUCKET = 50_000_000
"""Elements of a bucket of gradients, which is a copy; DeepSpeed's default of 500 million takes 2 GB."""

_BF16_WEIGHTS: dict[str, Any] = {
    # ZeRO-1's optimizer for bf16 adds gradients to fp32 ones as they come, instead of at the end of the pass.
    "bf16": {"enabled": True, "immediate_grad_update": True},
    "data_types": {"grad_accum_dtype": "fp32"},  # sums of micro steps
}


def deepspeed_config(train: TrainConfig, zero: ZeroConfig, *, cuda: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration dict. Masters are fp32; the model autocasts to bf16, as in every engine and stage.

    With `zero.weights` bf16 so do its weights lie in memory, and they and gradients are sent as bf16.
    """
    zero_optimization: dict[str, Any] = {"stage": zero.stage}
    if zero.stage > 0:
        # Contiguous gradients avoid fragmented GPU memory; on a CPU they waste a tenth of the step.
        zero_optimization |= {"contiguous_gradients": cuda, "overlap_comm": cuda, "reduce_bucket_size": REDUCE_BUCKET}
    if zero.offload_optimizer:
        zero_optimization["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if zero.offload_parameters:
        zero_optimization["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return {
        **(_BF16_WEIGHTS if zero.weights == "bf16" else {}),
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.max_grad_norm or 0.0,  # 0: none
        "zero_optimization": zero_optimization,
        # DeepSpeed's Adam is compiled on first use; torch's needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }


def import_deepspeed(*, cuda: bool) -> Any:
    """Import DeepSpeed quietly and without its just-in-time compiler.

    On a CPU it would compile a shared-memory collective at start: that takes half a minute, fails without a C++
    compiler and hangs on the lock of a killed build. gloo does as well.
    """
    if not cuda:
        # It would take any GPU, even one not assigned to this worker.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with _absent("mlflow"):  # its autotuner would spend seconds importing it
        import deepspeed
        import deepspeed.ops

    if not cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return deepspeed


@contextmanager
def _absent(name: str) -> Iterator[None]:
    """Within this context, hide a module that isn't imported yet."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _collecting(checkpoint_engine: Any) -> Iterator[dict[str, Any]]:
    """Within this context, what DeepSpeed saves is put into a dict by path, and no file or folder is made."""
    collected: dict[str, Any] = {}

    def save(state_dict: Any, path: str) -> None:
        collected[path] = state_dict

    checkpoint_engine.save, checkpoint_engine.makedirs = save, lambda path, exist_ok=False: None
    try:
        yield collected
    finally:
        del checkpoint_engine.save, checkpoint_engine.makedirs


def _to_universal(source: Path, target: Path) -> None:
    """Convert a checkpoint of ZeRO's shards into one file per parameter and moment."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # of ZeRO 1 and 2
    )
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # it prints each file's name
        ds_to_universal.main(arguments)


class DeepSpeedEngine(SavesCheckpoints):
    """ZeRO stages 0 to 3, with the optimizer on the device or in host memory. Needs a process group."""

    def __init__(self, model: DreamBoothModel, train: TrainConfig, zero: ZeroConfig, device: str) -> None:
        cuda = device.startswith("cuda")
        deepspeed = import_deepspeed(cuda=cuda)
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = device
        self.config = train
        self.stage = zero.stage
        settings = deepspeed_config(train, zero, cuda=cuda)
        exact: ExactWeights | None = None
        if zero.weights == "bf16":
            exact = ExactWeights.before_rounding(model, settings, stage=self.stage)
        elif model.stored:
            partition(model, settings)
        if zero.gather_blocks:
            gather_by_block(model)
        optimizer = build_optimizer(model, train)
        with redirect_stdout(StringIO()):  # ZeRO-1's optimizer for bf16 prints how much memory there is
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                lr_scheduler=build_lr_scheduler(optimizer, train),
                config=settings,
            )
        if exact is not None:
            exact.put_back()
        # It would copy scripts into every checkpoint, and could fail between two barriers.
        self._engine._copy_recovery_script = lambda save_path: None
        self._snapshots = Snapshots(device)
        self._grad_norm = 0.0
        self._diverged_at: int | None = None
        self.ema = None if train.ema_decay is None else Ema(self._masters(), train.ema_decay)

    def _masters(self) -> list[Tensor]:
        """The fp32 tensors of this rank's optimizer: whole parameters, or its partitions."""
        if self.stage == 0:
            return list(self._engine.module.parameters())
        return masters_of(self._engine.optimizer)

    def __call__(self, batch: Batch) -> Losses:
        """Losses of this rank's batch."""
        losses: Losses = self._engine(*batch.to(self.device))
        return losses

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient; DeepSpeed divides by the accumulation steps."""
        self._engine.backward(loss)

    def step(self) -> None:
        """Update at the accumulation boundary."""
        boundary = self._engine.is_gradient_accumulation_boundary()
        if boundary and self.stage == 0:
            # Without ZeRO it keeps no norm; gradients are already averaged over ranks.
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        step = self._steps + 1
        if boundary:
            self._snapshots.settle()
        self._engine.step()
        if boundary and self.stage > 0:
            self._grad_norm = float(self._engine.get_global_grad_norm())  # inf if ZeRO skipped the step
        if boundary and self._diverged_at is None and not 0 <= self._grad_norm < math.inf:
            self._diverged_at = step
        if boundary and self.ema is not None:
            self.ema.update()

    @property
    def _steps(self) -> int:
        return int(self._engine.lr_scheduler.last_epoch)

    def diverged_at(self, *, wait: bool = True) -> int | None:
        """The first step with a non-finite gradient; ZeRO waits for the norm at every step."""
        return self._diverged_at

    def _tensors(self) -> list[Tensor]:
        optimizer = self._engine.optimizer
        states = (optimizer.optimizer if self.stage else optimizer).state.values()
        moments = (moment for state in states for moment in state.values() if isinstance(moment, Tensor))
        return [*self._masters(), *moments]

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over all ranks."""
        dist.all_reduce(values)
        return values / self.world_size

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping."""
        return self._grad_norm

    @property
    def learning_rates(self) -> Sequence[float]:
        """Learning rates of the denoiser and, if trained, the text encoder."""
        return [float(rate) for rate in self._engine.lr_scheduler.get_last_lr()]

    def state_dict(self, *, averaged: bool = True) -> dict[str, Tensor]:
        """Gather the fp32 masters, or their moving average, parameter by parameter, on rank 0."""
        self._check()
        self._snapshots.settle()
        state = {}
        with self.ema.applied() if self.ema is not None and averaged else nullcontext():
            for name, parameter in self._engine.module.named_parameters():
                whole = self._whole(parameter)
                if self.rank == 0:
                    state[name] = whole.to("cpu", torch.float32, copy=True)
        return self._engine.module.exported(state) if self.rank == 0 else {}

    def _whole(self, parameter: Tensor) -> Tensor:
        """A whole parameter, gathered from all ranks; a frozen one has no master."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        if self.stage > 0 and parameter.requires_grad:
            master: Tensor = safe_get_full_fp32_param(parameter)
            return master
        with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
            return parameter.detach().clone()

    def checkpoint_files(self) -> list[CheckpointFile]:
        """This rank's shards, and its part of the moving average."""
        client_state = {"ema_steps": self.ema.steps if self.ema else 0}
        with _collecting(self._engine.checkpoint_engine) as collected:
            self._engine.save_checkpoint(_ROOT, tag=_TAG, client_state=client_state, save_latest=False)
        files = [
            CheckpointFile(name=PurePosixPath(path).relative_to(_ROOT).as_posix(), content=state)
            for path, state in collected.items()
        ]
        return files if self.ema is None else [*files, self.ema.file(f"ema-{self.rank}.safetensors")]

    def load(self, directory: Path) -> None:
        """Load a checkpoint written by `save`, on any number of ranks: ZeRO's shards are divided anew.

        Raises FileNotFoundError if there is no checkpoint, ValueError for a moving average sharded for other ranks.
        """
        self._snapshots.settle()
        saved_by = len(list((directory / _TAG).glob("*_optim_states.pt")))
        if self.stage == 0 or saved_by in (0, self.world_size):
            with redirect_stdout(StringIO()):
                path, client_state = self._engine.load_checkpoint(str(directory), tag=_TAG)
        elif self.ema is not None:
            raise ValueError(
                f"the moving average in {directory} has {saved_by} shards, which don't fit {self.world_size} "
                f"ranks; continue with {saved_by} workers, or without train.ema_decay"
            )
        else:
            path, client_state = self._load_universal(directory)
        if path is None:
            raise FileNotFoundError(f"there is no DeepSpeed checkpoint {_TAG!r} in {directory}")
        if self.ema is not None:
            self.ema.load(directory / f"ema-{self.rank}.safetensors", client_state["ema_steps"])

    def _load_universal(self, directory: Path) -> Any:
        """Load another number of shards through DeepSpeed's universal checkpoints."""
        groups = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in self._param_groups]
        with tempfile.TemporaryDirectory(prefix="dreambooth-universal-") as folder:
            _to_universal(directory / _TAG, Path(folder, _TAG))
            self._engine._config.load_universal_checkpoint = True
            try:
                found = self._engine.load_checkpoint(folder, tag=_TAG)
            finally:
                self._engine._config.load_universal_checkpoint = False
        # ZeRO-3 gives every group the first one's settings and a shared step counter, which each would advance.
        for group, settings, rate in zip(self._param_groups, groups, self.learning_rates, strict=True):
            group.update(settings, lr=rate)
        for state in self._engine.optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()
        return found

    @property
    def _param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def close(self) -> None:
        """Free the engine for the worker's next subject."""
        self._snapshots.close()
        self._engine.destroy()
