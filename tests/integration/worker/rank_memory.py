"""One of four processes that read a model of 1 GB for ZeRO-3; started by test_rank_memory.py.

    RANK=0 WORLD_SIZE=4 ... python rank_memory.py SMALL_BASE BASE OUTPUT

Every rank writes OUTPUT/memory-<rank>.json: by how many bytes its peak of resident memory has grown since the imports,
and the bytes of the parts that it holds; and by how many while the engine was made of another such model.
"""

import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from dreambooth.config.settings import DreamBoothConfig, ZeroConfig, load_config
from dreambooth.quiet import quiet
from dreambooth.training.model import load_model
from pipelines.worker.deepspeed_engine import DeepSpeedEngine, deepspeed_config, import_deepspeed
from pipelines.worker.zero3 import partition


def peak_bytes() -> int:
    """The most resident memory that this process had since `forget_peak`."""
    [kib] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) * 1024


def forget_peak() -> None:
    """Let the peak be what is resident now: imports had a higher one, under which the model would not show."""
    Path("/proc/self/clear_refs").write_text("5")


def settings(base: Path) -> DreamBoothConfig:
    """Settings of a run that trains the base."""
    subject = {"name": "rex", "class_noun": "car", "identifier": "tfz", "instance_images": "photos"}
    return load_config({"base_model": str(base), "subject": subject})


def load(base: Path) -> Any:
    """A model as a rank of ZeRO-3 loads it."""
    config = settings(base)
    model = load_model(base, config, whole=False)
    partition(model, deepspeed_config(config.train, ZeroConfig(stage=3)))
    return model


def build(base: Path) -> None:
    """Make a rank's engine: its parts, their masters, gradients and moments."""
    config = settings(base)
    DeepSpeedEngine(load_model(base, config, whole=False), config.train, ZeroConfig(stage=3), "cpu").close()


if __name__ == "__main__":
    quiet()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    small, large, output = map(Path, sys.argv[1:])
    import_deepspeed(cuda=False).init_distributed("gloo", auto_mpi_discovery=False)
    load(small)  # with all that is imported on the way
    build(small)
    forget_peak()
    before = peak_bytes()
    parts = [parameter.ds_tensor for parameter in load(large).parameters()]
    found = {"held": sum(part.numel() * part.element_size() for part in parts), "peak": peak_bytes() - before}
    del parts
    gc.collect()
    forget_peak()
    build(large)
    found["built"] = peak_bytes() - before
    (output / f"memory-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
