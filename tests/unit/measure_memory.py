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

import torch

from dreambooth.batches import Batch
from dreambooth.config import load_config
from dreambooth.empty_step import latent_shape
from dreambooth.engine import TorchEngine
from dreambooth.families import family_of
from dreambooth.families.stable_diffusion import load_tokenizer
from dreambooth.miniature import PIPELINE_DIR as MINIATURE
from dreambooth.model import Components, build_model, load_schedule
from dreambooth.quiet import quiet

STEPS = 3


def _status(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def _train(directory: Path, *, pairs: int, resolution: int = 64, checkpointing: bool = False) -> None:
    subject = {
        "name": "rex",
        "class_noun": "car",
        "identifier": "tfz",
        "instance_images": "photos",
    }
    train = {"micro_batch_size": pairs, "gradient_checkpointing": checkpointing}
    config = load_config({"base_model": str(directory), "subject": subject, "train": train})
    family = family_of(directory)
    denoiser, text_encoder = family.empty_components(directory, device="cpu")
    components = Components(
        family=family,
        directory=directory,
        denoiser=denoiser,
        text_encoder=text_encoder,
        schedule=load_schedule(directory),
    )
    engine = TorchEngine(build_model(components, config), config.train)
    shape = (2 * pairs, *latent_shape(directory, resolution))
    ids = torch.full((2 * pairs, load_tokenizer(directory).model_max_length), 5)
    for _ in range(STEPS):
        batch = Batch(torch.randn(shape), torch.randn(shape), torch.randint(0, 1000, (2 * pairs,)), ids)
        engine.backward(engine(batch).total)
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
