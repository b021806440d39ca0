"""Versions, system and devices of this process, for bug reports and measurements."""

import functools
import platform
import subprocess
from pathlib import Path

from dreambooth.amounts import counted, readable_bytes
from pipelines.cluster.processor import processor_name
from pipelines.cluster.ray_cluster import usable_cpus
from pipelines.plan.node_facts import gpus, installed_versions

_ROOT = Path(__file__).parents[2]
_GIT_SECONDS = 5


def describe_here() -> dict[str, str]:
    """What a bug report or a measurement has to say, by name, without paths and host names."""
    import psutil
    import torch

    versions = installed_versions()
    libc = " ".join(platform.libc_ver())
    return {
        "dreambooth": versions.pop("dreambooth") + commit(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, {libc}",
        "processor": f"{processor_name()}, {counted(usable_cpus(), 'CPU')} to use",
        "memory": readable_bytes(psutil.virtual_memory().total),
        "GPUs": ", ".join(f"{name} ({readable_bytes(size)})" for name, size in gpus()) or "none",
        "CUDA": str(torch.version.cuda or "none: torch was built without it"),
        **versions,
    }


def git(*arguments: str) -> str | None:
    """What git prints about this checkout; None for an installed package, or if git fails."""
    if not (_ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def commit() -> str:
    """The commit of a checkout, and whether it was changed; empty for an installed package."""
    if not (_ROOT / ".git").exists():
        return ""
    commit, changes = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain")
    if commit is None or changes is None:
        return ", a checkout whose commit git doesn't know"
    return f", commit {commit}{', changed' if changes else ''}"
