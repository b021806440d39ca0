"""The best dtype for sampling on a device, by name: a plan chooses it for all workers, without importing PyTorch."""

from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def best_dtype(device: str) -> str:
    """Half precision where the device multiplies it itself: float16 on CUDA, bfloat16 or float32 on a CPU."""
    if device.startswith("cuda"):
        return "float16"
    return "bfloat16" if multiplies_bf16() else "float32"


@cache
def multiplies_bf16() -> bool:
    """Whether this machine's CPU has AVX-512's or AMX's instructions for bfloat16."""
    if not _CPUINFO.exists():  # not Linux
        import torch

        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    flags = next((line for line in _CPUINFO.read_text().splitlines() if line.startswith("flags")), "")
    return not {"avx512_bf16", "amx_tile"}.isdisjoint(flags.split())
