"""This machine's processor and GPUs: their names, and the memory of GPUs."""

import gc
import platform
from collections.abc import Callable
from pathlib import Path

from pipelines.cluster.gpus import USABLE


def processor_name() -> str:
    """The processor's model name, or its architecture where the system doesn't name it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def device_name(device: str) -> str:
    """The model name of what a torch device computes on."""
    if device == "cpu":
        return processor_name()
    import torch

    return torch.cuda.get_device_name(device)


def device_bytes(device: str) -> int | None:
    """Memory of a torch device that has its own; None for a CPU."""
    if device == "cpu":
        return None
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)


def make_room(device: str, needed: int, unload: Callable[[], None]) -> None:
    """Call `unload`, and free what it lets go, unless a torch device has room for `needed` bytes; a CPU always has."""
    there = device_bytes(device)
    if there is None or needed <= USABLE * there:
        return
    import torch

    unload()
    gc.collect()  # modules, and functions and their model, hold each other in circles
    torch.cuda.empty_cache()
