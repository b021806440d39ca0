"""How fast is training on this GPU, and what is the GPU busy with? Writes output/bench/gpu.json.

    python tests/bench/gpu.py                        # needs a CUDA device with 80 GiB
    python tests/bench/gpu.py stable-diffusion-1.5   # one size only; 40 GiB
    python tests/bench/gpu.py miniature              # on whatever there is: does it run?

Random weights of a published size, fp32 masters under bf16, one instance and one class image a step, all layers
trained; steps per second are medians by wall clock. The bare loop and `fit` take turns: clocks change.

- loop_efficiency: `fit` with TorchEngine over a bare loop (same model, batch, optimizer; nothing else).
- steps_per_second, peak_gib: of `fit` by engine, with and without gradient checkpointing.
- busy_share: of the time of `fit`, how much the GPU has a kernel to run; share_of_time: by kind of kernel, and idle.
- class images: images per second (fp16, 20 steps, guidance 7.5, batches of 8), eager and from graphs, and over those of
  plain diffusers, which takes turns with them.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from full_size import configuration, random_model, write_configurations, write_published
from loops import bare_loop, efficiency, fitted, random_data, take_turns
from sampling_speed import images_per_second
from stamps import Figures, stamp, stamped, together
from step_profile import step_profile

from dreambooth.config.settings import DreamBoothConfig, ZeroConfig
from dreambooth.data.batches import TrainingData
from dreambooth.miniature import PIPELINE_DIR
from dreambooth.models.families import family_of, load_tokenizer
from dreambooth.quiet import hide_progress_bars, quiet
from dreambooth.training.engine import TorchEngine
from dreambooth.training.model import DreamBoothModel

OUTPUT = Path("output/bench/gpu.json")
ROUNDS = 5
GIB = 2**30
SIZES: dict[str, tuple[Callable[[Path], None], int]] = {
    "stable-diffusion-1.5": (write_configurations, 512),
    "stable-diffusion-xl": (partial(write_published, "stable-diffusion-xl"), 1024),
    "miniature": (lambda folder: None, 64),
}
"""What writes a size's configurations into a folder, and its pixels."""


class Bench:
    """A base model's folder, and what is measured of it."""

    def __init__(self, base: Path, resolution: int, device: str, *, steps: int) -> None:
        self._base, self._resolution, self._device, self._steps = base, resolution, device, steps

    def settings(self, *, checkpointing: bool = False) -> DreamBoothConfig:
        overrides = (f"train.max_train_steps={self._steps}", "train.micro_batch_size=1", "train.log_every=10")
        return configuration(self._base, *overrides, f"train.gradient_checkpointing={str(checkpointing).lower()}")

    def model(self, settings: DreamBoothConfig) -> DreamBoothModel:
        return random_model(self._base, settings, device=self._device, autocast=True)

    def data(self) -> TrainingData:
        text = family_of(self._base).tokenize(self._base, ["a photo of a dog"])
        return random_data(self._base, self._resolution, text, text)

    def clear(self) -> None:
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        return round(torch.cuda.max_memory_allocated() / GIB, 2) if self._device == "cuda" else 0.0

    def loop_efficiency(self) -> Figures:
        settings = self.settings()
        model = self.model(settings)
        engine = TorchEngine(model, settings.train, self._device)
        data = self.data()
        bare = bare_loop(model, data, settings, self._device)
        return efficiency(*take_turns(self._steps, ROUNDS, bare, fitted(engine, data, settings)))

    def variant(self, stage: int | None, *, checkpointing: bool = False, channels_last: bool = False) -> Figures:
        settings = self.settings(checkpointing=checkpointing)
        model = self.model(settings)
        if channels_last:
            model.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        engine: Any
        if stage is None:
            engine = TorchEngine(model, settings.train, self._device)
        else:
            from pipelines.worker.deepspeed_engine import DeepSpeedEngine

            engine = DeepSpeedEngine(model, settings.train, ZeroConfig(stage=stage), self._device)
        try:
            run = fitted(engine, self.data(), settings)
            [rates] = take_turns(self._steps, ROUNDS, run)
            peak = self.peak()
            return {"steps_per_second": round(statistics.median(rates), 2), "peak_gib": peak} | step_profile(run)
        finally:
            engine.close()

    def class_images(self) -> Figures:
        from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline

        from dreambooth.sampling.sampler import sampling_dtype

        with tempfile.TemporaryDirectory() as folder:
            with torch.device(self._device):
                vae = AutoencoderKL.from_config(AutoencoderKL.load_config(self._base, subfolder="vae"))
            model = self.model(self.settings())
            dtype = sampling_dtype(self._device)
            StableDiffusionPipeline(
                unet=model.denoiser.to(dtype),
                text_encoder=model.text_encoders["text_encoder"].to(dtype),
                vae=vae.to(dtype),
                tokenizer=load_tokenizer(self._base),
                scheduler=DDPMScheduler.from_pretrained(self._base, subfolder="scheduler"),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            ).save_pretrained(folder)
            del model, vae
            self.clear()
            rates = images_per_second(Path(folder), self._resolution, self._device)
        return rates | {"peak_gib": self.peak()}


def measure(size: str, device: str) -> Figures:
    """All figures of a size."""
    write, resolution = SIZES[size]
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        base = PIPELINE_DIR if size == "miniature" else Path(folder)
        write(base)
        bench = Bench(base, resolution, device, steps=2 if size == "miniature" else 20)
        measures: dict[str, Callable[[], Figures]] = {
            "loop": bench.loop_efficiency,
            "torch": partial(bench.variant, None),
            "torch, channels last": partial(bench.variant, None, channels_last=True),
            "torch, checkpointing": partial(bench.variant, None, checkpointing=True),
            "deepspeed zero 2": partial(bench.variant, 2),
        }
        if family_of(base).pipeline_class == "StableDiffusionPipeline":
            measures["class images"] = bench.class_images
        for name, one in measures.items():
            bench.clear()
            figures[name] = one()
            print(json.dumps({size: {name: figures[name]}}), file=sys.stderr, flush=True)
    return figures


def main() -> None:
    quiet()
    hide_progress_bars()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = list(SIZES)[:2]
    parser.add_argument("sizes", nargs="*", choices=SIZES, default=usual, metavar="SIZE", help=", ".join(SIZES))
    sizes = parser.parse_args().sizes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and sizes != ["miniature"]:
        parser.error("PyTorch sees no CUDA device here; to see whether this runs, measure the size `miniature`")
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    measured: list[Figures] = []
    for size in sizes:
        at = stamp()
        measured.append(stamped({size: measure(size, device)}, at))
        # What is measured stays when the next size doesn't fit.
        OUTPUT.write_text(json.dumps(together(*measured), indent=2) + "\n")
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main()
