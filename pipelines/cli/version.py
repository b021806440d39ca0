"""`dreambooth version`: what a bug report needs."""

from collections.abc import Iterator

import click


@click.command()
def version() -> None:
    """Print versions, system and devices for a bug report."""
    rows = list(_rows())
    width = max(len(what) for what, _ in rows)
    for what, found in rows:
        click.echo(f"{what:<{width}}  {found}")


def _rows() -> Iterator[tuple[str, str]]:
    import platform

    import psutil
    import torch

    from pipelines.cluster.ray_cluster import usable_cpus
    from pipelines.plan.describe import readable_bytes
    from pipelines.plan.node_facts import gpus, installed_versions

    versions = installed_versions()
    yield "dreambooth", versions.pop("dreambooth") + _commit()
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}, {' '.join(platform.libc_ver())}"
    yield "processor", f"{_processor()}, {usable_cpus()} CPUs to use"
    yield "memory", readable_bytes(psutil.virtual_memory().total)
    yield "GPUs", ", ".join(f"{name} ({readable_bytes(size)})" for name, size in gpus()) or "none"
    yield "CUDA", str(torch.version.cuda or "none: torch was built without it")
    yield from versions.items()


def _commit() -> str:
    """The commit of a checkout, and whether it was changed; empty for an installed package."""
    import subprocess
    from pathlib import Path

    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    git = ("git", "-C", str(root))
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ", a checkout whose commit git can't tell"
    return f", commit {commit.stdout.strip()}{', changed' if changes.stdout else ''}"


def _processor() -> str:
    import platform
    from pathlib import Path

    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
