"""An exponential moving average of the optimizer's tensors, sharded as they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dreambooth.training.checkpoint_files import CheckpointFile, write_safetensors


class Ema:
    """Averages of this rank's fp32 masters: `average = decay * average + (1 - decay) * master` after every step.

    Early steps use min(decay, (1 + n) / (10 + n)), so that short runs don't lag behind at the base weights.
    """

    def __init__(self, masters: Sequence[Tensor], decay: float) -> None:
        self.masters = list(masters)
        self.decay = decay
        self.steps = 0
        self.averages = [master.detach().clone() for master in self.masters]

    def update(self) -> None:
        """Update the averages after an optimizer step."""
        self.move(self.next_weight())

    def next_weight(self) -> float:
        """Count a step; the weight of the masters in its averages, 1 - decay."""
        self.steps += 1
        return 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))

    @torch.no_grad()
    def move(self, weight: float | Tensor) -> None:
        """Move the averages towards the masters by a weight, which may be a scalar tensor of theirs."""
        for average, master in zip(self.averages, self.masters, strict=True):
            average.lerp_(master.detach(), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the masters hold the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self.averages, self.masters, strict=True):
            kept = master.detach().clone()
            master.copy_(average)
            average.copy_(kept)

    def file(self, name: str) -> CheckpointFile:
        """A checkpoint's file with this rank's averages."""
        averages = {f"{i}": average for i, average in enumerate(self.averages)}
        write = partial(write_safetensors, metadata={"steps": str(self.steps)})
        return CheckpointFile(name=name, content=averages, write=write)

    def load(self, path: Path, steps: int) -> None:
        """Read what `file` is written as, after `steps` updates."""
        tensors = load_file(path)
        for i, average in enumerate(self.averages):
            average.copy_(tensors[f"{i}"])
        self.steps = steps
