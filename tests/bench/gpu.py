"""How fast is training on this GPU, and what is the GPU busy with? Writes output/bench/gpu.json.

    python tests/bench/gpu.py                        # needs a CUDA device with 80 GiB
    python tests/bench/gpu.py stable-diffusion-1.5   # one size only; 40 GiB
    python tests/bench/gpu.py published              # steps of all families' published models, those that fit
    python tests/bench/gpu.py miniature              # on whatever there is: does it run?

Random weights of a published size, fp32 masters under bf16, one instance and one class image a step, all layers
trained; steps per second are medians by wall clock. What runs out of memory or time leaves its reason in its place, and
every measure is written as soon as it is made.

- loop_efficiency: `fit` with TorchEngine over a bare loop (same model, batch, optimizer; nothing else), in turns.
- steps_per_second by engine; peak_gib of tensors, and reserved_gib, what PyTorch took for them and for graphs.
- busy_share: of the time of `fit`, how much the GPU has a kernel to run; share_of_time: by kind of kernel, and idle.
- graphs: `train.graph`, by the way of a lane; not_graphed has the reasons where a step was not captured. Metrics are
  read at every tenth step, as for all engines here, and at every step, which is the default of `train.log_every`.
- paper's run: seconds of 1,000 steps, metrics at every step, with two checkpoints on the disk of output/bench/.
- two lanes: steps per second of two processes that share the GPU, together.
- class images: images per second (fp16, 20 steps, guidance 7.5, batches of 8), eager and from graphs, and over those of
  plain diffusers, which takes turns with them.
- published: see published_steps.py.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from attempts import Attempts
from full_size import write_configurations, write_published
from gpu_engines import Bench
from gpu_lanes import lanes_together
from published_steps import published_measures
from stamps import Figures, Stamp, stamp, stamped, together

from dreambooth.config.settings import ZeroConfig
from dreambooth.miniature import PIPELINE_DIR
from dreambooth.models.families import family_of
from dreambooth.quiet import hide_progress_bars, quiet

OUTPUT = Path("output/bench/gpu.json")
SECONDS = 840
"""Of a whole run, before which the last measure begins and at which it ends."""
A_MEASURE, A_LONG_ONE = 90, 180


@dataclass(frozen=True, kw_only=True)
class Size:
    """A size: what writes its configurations into a folder, the pictures' side, steps of a round and of a long run."""

    write: Callable[[Path], object]
    pixels: int
    steps: int
    whole_run: int | None = None
    lane_seconds: float | None = None


SIZES = {
    "stable-diffusion-1.5": Size(write=write_configurations, pixels=512, steps=20, whole_run=1000, lane_seconds=8),
    "stable-diffusion-xl": Size(write=partial(write_published, "stable-diffusion-xl"), pixels=1024, steps=8),
    "miniature": Size(write=lambda folder: None, pixels=64, steps=2, whole_run=10, lane_seconds=1),
}
PUBLISHED = "published"
Measures = Mapping[str, tuple[Callable[[], Figures], float]]


def measures_of(size: Size, base: Path, device: str) -> Measures:
    """What is measured of a size, with the most seconds of each: what matters most comes first."""
    bench = Bench(base, size.pixels, device, steps=size.steps)

    def zero(stage: Literal[2, 3], **settings: Any) -> tuple[Callable[[], Figures], float]:
        return partial(bench.deepspeed, ZeroConfig(stage=stage, **settings)), A_MEASURE

    measures: dict[str, tuple[Callable[[], Figures], float]] = {
        "torch": (bench.plain, A_MEASURE),
        "torch, graphs": (bench.graphed, A_MEASURE),
    }
    if size.whole_run is not None:
        OUTPUT.parent.mkdir(parents=True, exist_ok=True)
        measures["paper's run"] = partial(bench.whole_run, size.whole_run, OUTPUT.parent), A_LONG_ONE
    if family_of(base).pipeline_class == "StableDiffusionPipeline":
        measures["class images"] = bench.class_images, A_LONG_ONE
    measures |= {"deepspeed zero 2": zero(2), "deepspeed zero 2, bf16": zero(2, weights="bf16")}
    if size.lane_seconds is not None:
        for name, graph in (("two lanes", "off"), ("two lanes, graphs", "auto")):
            shared = partial(
                lanes_together, 2, base, pixels=size.pixels, device=device, steps=size.steps, seconds=size.lane_seconds
            )
            measures[name] = partial(shared, graph=graph), A_MEASURE
    return measures | {
        "torch, graphs, read at every step": (partial(bench.graphed, "train.log_every=1"), A_MEASURE),
        "deepspeed zero 3, gather_blocks": (
            partial(bench.deepspeed, ZeroConfig(stage=3, gather_blocks=True)),
            A_MEASURE,
        ),
        "deepspeed zero 3": (partial(bench.deepspeed, ZeroConfig(stage=3)), A_MEASURE),
        "loop": (bench.loop_efficiency, A_MEASURE),
        "torch, checkpointing": (partial(bench.plain, "train.gradient_checkpointing=true"), A_MEASURE),
        "torch, channels last": (partial(bench.plain, channels_last=True), A_MEASURE),
    }


def measure(
    measures: Measures, attempts: Attempts, clear: Callable[[], None], write: Callable[[Figures], None]
) -> None:
    """Make measures one after the other; `write` takes the figures so far after each."""
    figures: Figures = {}
    for name, (one, seconds) in measures.items():
        clear()
        figures[name] = attempts(one, seconds)
        write(figures)


def main() -> None:
    quiet()
    hide_progress_bars()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = list(SIZES)[:2]
    known = [*SIZES, PUBLISHED]
    parser.add_argument("sizes", nargs="*", choices=known, default=usual, metavar="SIZE", help=", ".join(known))
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="of the whole run at most (default: %(default)s)"
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and options.sizes != ["miniature"]:
        parser.error("PyTorch sees no CUDA device here; to see whether this runs, measure the size `miniature`")
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    attempts, measured = Attempts(options.seconds), dict[str, Figures]()
    for name in options.sizes:
        at = stamp()

        def write(found: Figures, name: str = name, at: Stamp = at) -> None:
            measured[name] = stamped({name: found}, at)
            print(json.dumps({name: dict([list(found.items())[-1]])}), file=sys.stderr, flush=True)
            OUTPUT.write_text(json.dumps(together(*measured.values()), indent=2) + "\n")

        if name == PUBLISHED:
            measure(published_measures(device, A_MEASURE), attempts, lambda: None, write)
            continue
        size = SIZES[name]
        with tempfile.TemporaryDirectory() as folder:
            base = PIPELINE_DIR if name == "miniature" else Path(folder)
            size.write(base)
            bench = Bench(base, size.pixels, device, steps=size.steps)
            measure(measures_of(size, base, device), attempts, bench.clear, write)
    print(f"wrote {OUTPUT}")
    if attempts.errors:
        sys.exit(f"{attempts.errors} of the measures ended with an error: see `not_measured`")


if __name__ == "__main__":
    main()
