"""The names of this machine's processor and GPUs."""

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
