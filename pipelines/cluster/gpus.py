"""The memory of GPUs, as their driver tells it: CUDA would take memory of each to tell."""

import subprocess

_ASK = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_SECONDS = 20


def smallest_gpu_bytes() -> int | None:
    """Memory of the smallest NVIDIA GPU of this machine; None if there is none that tells."""
    try:
        told = subprocess.run(_ASK, check=True, capture_output=True, text=True, timeout=_SECONDS).stdout
        return min(int(mebibytes) << 20 for mebibytes in told.split("\n") if mebibytes)
    except (OSError, subprocess.SubprocessError, ValueError):  # no such program, no driver, or "[N/A]"
        return None
