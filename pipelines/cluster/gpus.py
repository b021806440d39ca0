"""GPUs of this machine: how many, and their memory by their driver, as asking CUDA would take memory of each."""

import subprocess
from importlib.metadata import version

USABLE = 0.9
"""Share of a GPU's memory: the rest is for CUDA's context, fragments, and what a prediction is off by."""
_ASK = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_SECONDS = 20


def count_gpus() -> int:
    """GPUs that PyTorch can use. Its build for CPUs has none, and need not be imported to know that."""
    if version("torch").endswith("+cpu"):
        return 0
    import torch

    return torch.cuda.device_count()


def smallest_gpu_bytes() -> int | None:
    """Memory of the smallest NVIDIA GPU of this machine; None if the driver knows of none."""
    try:
        printed = subprocess.run(_ASK, check=True, capture_output=True, text=True, timeout=_SECONDS).stdout
        return min(int(mebibytes) << 20 for mebibytes in printed.split("\n") if mebibytes)
    except (OSError, subprocess.SubprocessError, ValueError):  # no such program, no driver, or "[N/A]"
        return None
