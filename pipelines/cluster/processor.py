"""This machine's processor and GPUs: their names, and the memory of GPUs."""

import platform
from pathlib import Path


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
