"""How fast is training on this GPU, at the size of Stable Diffusion 1.5? Writes output/bench/gpu.json.

    python tests/bench/gpu.py                # needs a CUDA device with 40 GiB
    python tests/bench/gpu.py --base tiny    # the miniature instead, on whatever there is: does it run?

UNet and text encoder of 982.5 M random parameters, fp32 masters under bf16, 512 x 512 pixels, one instance and one
class image a step, all layers trained; steps per second are medians. The bare loop and `fit` take turns: clocks change.

- loop_efficiency: `fit` with TorchEngine over a bare loop (same model, batch, optimizer; nothing else).
- steps_per_second, peak_gib: of `fit` by engine, with and without gradient checkpointing.
- class_images_per_second: of the prior stage's sampling (fp16, 20 steps, guidance 7.5, batches of 8).
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks_page import stamped
from full_size import configuration, random_model, write_configurations
from loops import bare_loop, efficiency, fitted, random_data, take_turns

from dreambooth.config.settings import DreamBoothConfig, ZeroConfig
from dreambooth.data.batches import TrainingData
from dreambooth.miniature import PIPELINE_DIR
from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.families import family_of, load_tokenizer
from dreambooth.quiet import hide_progress_bars, quiet
from dreambooth.training.engine import TorchEngine
from dreambooth.training.model import DreamBoothModel

OUTPUT = Path("output/bench/gpu.json")
ROUNDS = 5
GIB = 2**30


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
        return random_data(self._base, BaseSettings(self._base).x0_shape(self._resolution), text, text)

    def clear(self) -> None:
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        return round(torch.cuda.max_memory_allocated() / GIB, 2) if self._device == "cuda" else 0.0

    def loop_efficiency(self) -> dict[str, float]:
        settings = self.settings()
        model = self.model(settings)
        engine = TorchEngine(model, settings.train, self._device)
        data = self.data()
        bare = bare_loop(model, data, settings, self._device)
        return efficiency(*take_turns(self._steps, ROUNDS, bare, fitted(engine, data, settings)))

    def variant(self, stage: int | None, *, checkpointing: bool, channels_last: bool = False) -> dict[str, float]:
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
            [rates] = take_turns(self._steps, ROUNDS, fitted(engine, self.data(), settings))
            return {"steps_per_second": round(statistics.median(rates), 2), "peak_gib": self.peak()}
        finally:
            engine.close()

    def class_images(self) -> dict[str, float]:
        from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline

        from dreambooth.sampling.sampler import load_pipeline, sample, sampling_dtype

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
            began = time.perf_counter()
            pipeline = load_pipeline(Path(folder), device=self._device, dtype=dtype)
            loaded = time.perf_counter() - began
        size: dict[str, Any] = {"height": self._resolution, "width": self._resolution}

        def images() -> float:
            began = time.perf_counter()
            sample(pipeline, ["a photo of a car"] * 8, range(8), num_inference_steps=20, guidance_scale=7.5, **size)
            return 8 / (time.perf_counter() - began)

        images()
        plain = [images() for _ in range(3)]
        pipeline.unet.to(memory_format=torch.channels_last)
        images()
        last = [images() for _ in range(3)]
        return {
            "load_seconds": round(loaded, 2),
            "class_images_per_second": round(statistics.median(plain), 2),
            "channels_last_images_per_second": round(statistics.median(last), 2),
            "peak_gib": self.peak(),
        }


def main() -> None:
    quiet()
    hide_progress_bars()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=("full", "tiny"), default="full")
    tiny = parser.parse_args().base == "tiny"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        base = PIPELINE_DIR if tiny else Path(folder)
        if not tiny:
            write_configurations(base)
        bench = Bench(base, 64 if tiny else 512, device, steps=2 if tiny else 20)
        measures: dict[str, Callable[[], dict[str, float]]] = {
            "loop": bench.loop_efficiency,
            "torch": lambda: bench.variant(None, checkpointing=False),
            "torch, channels last": lambda: bench.variant(None, checkpointing=False, channels_last=True),
            "torch, checkpointing": lambda: bench.variant(None, checkpointing=True),
            "deepspeed zero 2": lambda: bench.variant(2, checkpointing=False),
            "class images": bench.class_images,
        }
        for name, measure in measures.items():
            bench.clear()
            figures[name] = measure()
            print(json.dumps({name: figures[name]}), file=sys.stderr, flush=True)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(stamped(figures), indent=2) + "\n")
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main()
