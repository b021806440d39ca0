"""The memory of GPUs by their driver: asking CUDA would take memory of each."""

import subprocess

_ASK = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_SECONDS = 20


def smallest_gpu_bytes() -> int | None:
    """Memory of the smallest NVIDIA GPU of this machine; None if the driver knows of none."""
    try:
        printed = subprocess.run(_ASK, check=True, capture_output=True, text=True, timeout=_SECONDS).stdout
        return min(int(mebibytes) << 20 for mebibytes in printed.split("\n") if mebibytes)
    except (OSError, subprocess.SubprocessError, ValueError):  # no such program, no driver, or "[N/A]"
        return None
