"""Images per second of a sampler on this device, against plain diffusers' of the same weights, in turns.

Plain is `StableDiffusionPipeline` as its documentation has it: all in the device's best dtype, the family's scheduler.
Ours are class images as a lane makes them, in blocks of 8 that are written as PNG behind the sampling: with and without
graphs, and with the denoiser's weights in channels last.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dreambooth.data.images import png_bytes
from dreambooth.sampling.graphs import Graphs
from dreambooth.sampling.sampler import load_pipeline, sample_each, sampling_dtype

BATCH, BATCHES, ROUNDS = 8, 3, 3
CALL: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 7.5}
PROMPT = "a photo of a car"


def images_per_second(base: Path, resolution: int, device: str) -> dict[str, Any]:
    """Medians by kind, each over plain diffusers in the same round, and the reasons of captures that failed."""
    size = {"height": resolution, "width": resolution}
    said: list[str] = []
    plain = _plain(base, device)
    ours = load_pipeline(base, device=device, dtype=sampling_dtype(device))

    def by_diffusers() -> None:
        for batch in range(BATCHES):
            seeds = range(batch * BATCH, (batch + 1) * BATCH)
            noise = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            plain([PROMPT] * BATCH, generator=noise, **CALL, **size)

    def by_us(graphs: Graphs | None) -> None:
        count = BATCH * BATCHES
        with tempfile.TemporaryDirectory() as folder:

            def written(image: Any) -> None:
                with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                    file.write(png_bytes(image))

            sample_each(written, ours, [PROMPT] * count, range(count), batch_size=BATCH, graphs=graphs, **CALL, **size)

    graphs = Graphs(device, said.append)
    kinds: dict[str, Callable[[], None]] = {
        "diffusers": by_diffusers,
        "eager": partial(by_us, None),
        "graphs": partial(by_us, graphs),
    }
    rates = _in_turns(kinds)
    ours.unet.to(memory_format=torch.channels_last)
    last = {f"{name}, channels last": kinds[name] for name in ("eager", "graphs")}
    rates |= {name: each for name, each in _in_turns({"diffusers": by_diffusers, **last}).items() if name in last}
    middle = {name: statistics.median(each) for name, each in rates.items()}
    return {
        "images_per_second": {name: round(rate, 2) for name, rate in middle.items()},
        "over_diffusers": {name: round(rate / middle["diffusers"], 2) for name, rate in middle.items()},
        "not_graphed": said,
        "captures": graphs.captures,
    }


def _in_turns(kinds: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for call in kinds.values():
        call()  # kernels are chosen, and captures made, in the first
    for _ in range(ROUNDS):
        for name, call in kinds.items():
            began = time.perf_counter()
            call()
            rates[name].append(BATCH * BATCHES / (time.perf_counter() - began))
    return rates


def _plain(base: Path, device: str) -> Any:
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        base, torch_dtype=sampling_dtype(device), safety_checker=None, local_files_only=True
    ).to(device)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
