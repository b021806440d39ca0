"""Processes that train as one group on this machine, without Ray."""

import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_together(
    commands: Sequence[Sequence[str]], logs: Path, *, timeout: float, variables: Mapping[str, str] | None = None
) -> None:
    """Run a command for each rank of a process group; all have to end well, or the ends of their logs are shown."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(commands))}
    environment = os.environ | common | dict(variables or {})
    paths = [logs / f"rank-{rank}.log" for rank in range(len(commands))]
    ranks = []
    for rank, (command, path) in enumerate(zip(commands, paths, strict=True)):
        with path.open("wb") as log:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=environment | own, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert set(codes) == {0}, "\n".join(path.read_text()[-3000:] for path in paths)
