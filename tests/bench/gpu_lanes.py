"""Steps per second of several lanes on one GPU: processes of one subject each, which train at the same time.

A lane is this file as a program: it trains until its kernels are chosen and its step is captured, says so, waits for a
line and trains for some seconds.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dreambooth.quiet import hide_progress_bars, quiet

READY = "ready"


def lanes_together(
    lanes: int, base: Path, *, pixels: int, device: str, steps: int, seconds: float, graph: str
) -> dict[str, Any]:
    """The sum of the lanes' rates while all of them train, and the memory of each."""
    command = [sys.executable, __file__, str(base), str(pixels), device, str(steps), str(seconds), graph]
    with_pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **with_pipes) for _ in range(lanes)]
    try:
        for process in processes:
            _line_of(process, READY)
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        found = [json.loads(_line_of(process, "{")) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    of_each = {name: [one[name] for one in found] for name in found[0]}
    return {"steps_per_second": round(sum(of_each.pop("steps_per_second")), 2), **of_each}


def _line_of(process: Any, begins: str) -> str:
    """A process's next line that begins so."""
    for line in process.stdout:
        if line.startswith(begins):
            return str(line)
    raise RuntimeError(f"a lane ended with {process.wait()} before it said {begins!r}; its errors are above")


def lane(base: Path, pixels: int, device: str, steps: int, seconds: float, graph: str) -> None:
    """Train, as told above, and print the rate."""
    from gpu_engines import Bench

    bench = Bench(base, pixels, device, steps=steps)
    run, said = bench.run_of_a_lane(graph=graph)
    run()
    print(READY, flush=True)
    sys.stdin.readline()
    made, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        run()
        made += steps
    if device == "cuda":
        torch.cuda.synchronize()
    rate = made / (time.perf_counter() - began)
    print(json.dumps({"steps_per_second": rate, **bench.peak(), "not_graphed": said}), flush=True)


def main() -> None:
    quiet()
    hide_progress_bars()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("pixels", type=int)
    parser.add_argument("device")
    parser.add_argument("steps", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("graph")
    lane(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
