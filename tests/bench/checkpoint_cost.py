"""What a checkpoint costs a training on a CPU: the time that its thread is blocked, and memory.

    python -m tests.bench.checkpoint_cost [--narrower N] [--resolution PIXELS] [--folder FOLDER]

UNet and text encoder with the layers of Stable Diffusion 1.5, each with a fraction of its channels, are trained by
one thread, so that a machine of two cores has one for what happens behind. Prints one JSON object:

- step_seconds: median of a step without a checkpoint.
- blocked_seconds: what the training's thread spent on the checkpoint: beginning it, waiting before the next update for
  what is being copied, and looking whether it is whole.
- whole_after_seconds: from its beginning until it was whole.
- checkpoint_bytes, extra_bytes: its size on disk, and by how much the process's largest memory was larger with it.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dreambooth.quiet import quiet
from dreambooth.training.engine import TorchEngine
from pipelines.worker.checkpoint_hook import Checkpoint
from pipelines.worker.checkpoints import StoredCheckpoints
from pipelines.worker.history import History
from tests.bench.full_size import configuration, random_batch, random_model, write_configurations

WARM_UP, BEFORE, EVERY = 1, 4, 8
"""Steps before anything is measured, steps without a checkpoint, and the step of the checkpoint."""


def measure(folder: Path, *, narrower: int, resolution: int) -> dict[str, float]:
    """Train a few steps in a folder, see above."""
    write_configurations(folder / "base", narrower=narrower)
    config = configuration(folder / "base", f"train.checkpoint_every={EVERY}")
    engine = TorchEngine(random_model(folder / "base", config, device="cpu"), config.train)
    batch = random_batch(folder / "base", config, pairs=1, resolution=resolution)
    messages: list[dict[str, Any]] = []
    checkpoints = StoredCheckpoints(f"{folder}/checkpoints", need_bytes=0, warn=print)
    history, any_metrics = History(), object()
    hook = Checkpoint(checkpoints, engine, history, config.train, messages.append, lambda here: here)

    def step() -> float:
        began = time.perf_counter()
        engine.backward(engine(batch).total)
        engine.step()
        history.step += 1
        return time.perf_counter() - began

    for _ in range(WARM_UP):
        step()
    _forget_peak()
    seconds = [step() for _ in range(BEFORE - WARM_UP)]
    peak_before = _peak_bytes()
    _forget_peak()
    in_hook = 0.0
    while not messages:
        step()
        began = time.perf_counter()
        hook.on_step(history.step, any_metrics)  # type: ignore[arg-type]
        in_hook += time.perf_counter() - began if history.step >= EVERY else 0.0
    size = sum(path.stat().st_size for path in folder.glob("checkpoints/*/*"))
    return {
        "step_seconds": round(statistics.median(seconds), 4),
        "blocked_seconds": round(in_hook + engine.snapshot_seconds_waited, 4),
        "whole_after_seconds": round(messages[0]["seconds"], 3),
        "checkpoint_bytes": size,
        "extra_bytes": _peak_bytes() - peak_before,
    }


def _forget_peak() -> None:
    """Let the process's largest memory be what it has now."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a checkpoint costs a training on a CPU.")
    parser.add_argument("--narrower", type=int, default=4, help="divisor of the channels: 1, 2 or 4 (default: 4)")
    parser.add_argument("--resolution", type=int, default=256, help="side of the pictures in pixels (default: 256)")
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: a temporary folder)")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dreambooth-cost-", dir=arguments.folder) as temporary:
        found = measure(Path(temporary), narrower=arguments.narrower, resolution=arguments.resolution)
        print(json.dumps(found))
