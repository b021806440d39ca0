"""Trains three steps and prints by how many bytes the process has grown at most; started by test_memory.py.

    python measure_memory.py BASE_MODEL '{"pairs": 1, "resolution": 64, "checkpointing": false}'

Weights are random, so a folder with the configurations of a base model will do.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

from dreambooth.miniature import PIPELINE_DIR as MINIATURE
from dreambooth.quiet import quiet
from dreambooth.training.engine import TorchEngine

sys.path.append(str(Path(__file__).parents[2] / "bench"))
from full_size import configuration, random_batch, random_model

STEPS = 3


def _status(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def _train(directory: Path, *, pairs: int, resolution: int = 64, checkpointing: bool = False) -> None:
    overrides = (f"train.micro_batch_size={pairs}", f"train.gradient_checkpointing={str(checkpointing).lower()}")
    config = configuration(directory, *overrides)
    engine = TorchEngine(random_model(directory, config, device="cpu"), config.train)
    for _ in range(STEPS):
        engine.backward(engine(random_batch(directory, config, pairs=pairs, resolution=resolution)).total)
        engine.step()


if __name__ == "__main__":
    quiet()
    options: dict[str, Any] = json.loads(sys.argv[2])
    # What is imported on the way, and the kernels' own, is there before anything is measured.
    _train(MINIATURE, pairs=1)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is not held any more
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    _train(Path(sys.argv[1]), **options)
    print(_status("VmHWM") - before)
