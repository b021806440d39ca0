"""An exponential moving average of the optimizer's tensors, sharded as they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Ema:
    """Averages of this rank's fp32 masters: `average = decay * average + (1 - decay) * master` after every step.

    Early steps use min(decay, (1 + n) / (10 + n)), so that short runs don't lag behind at the base weights.
    """

    def __init__(self, masters: Sequence[Tensor], decay: float) -> None:
        self.masters = list(masters)
        self.decay = decay
        self.steps = 0
        self.averages = [master.detach().clone() for master in self.masters]

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages after an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for average, master in zip(self.averages, self.masters, strict=True):
            average.lerp_(master.detach(), 1 - decay)

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

    def save(self, path: Path) -> None:
        """Write this rank's averages as safetensors."""
        save_file(
            {f"{i}": average.contiguous() for i, average in enumerate(self.averages)}, path, {"steps": str(self.steps)}
        )

    def load(self, path: Path, steps: int) -> None:
        """Read what `save` wrote, after `steps` updates."""
        tensors = load_file(path)
        for i, average in enumerate(self.averages):
            average.copy_(tensors[f"{i}"])
        self.steps = steps
