"""What tests/bench/gpu.py measures of a base model's engines, each in a function of its own."""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from full_size import configuration, plan_of_weightless, random_model
from loops import bare_loop, efficiency, fitted, random_data, take_turns
from sampling_speed import images_per_second
from stamps import Figures
from step_profile import step_profile

from dreambooth.config.settings import DreamBoothConfig, ZeroConfig
from dreambooth.data.batches import TrainingData
from dreambooth.models.families import family_of, load_tokenizer
from dreambooth.training.engine import TorchEngine
from dreambooth.training.loop import StepMetrics, fit
from dreambooth.training.model import DreamBoothModel
from pipelines.driver.train_stage import train_task
from pipelines.tasks import Message
from pipelines.worker.checkpoint_hook import Checkpoint
from pipelines.worker.checkpoints import StoredCheckpoints
from pipelines.worker.graphs import Graphs
from pipelines.worker.history import History

ROUNDS = 3
GIB = 2**30


class Bench:
    """A base model's folder, and what is measured of it, in rounds of so many steps."""

    def __init__(self, base: Path, pixels: int, device: str, *, steps: int) -> None:
        self._base, self._pixels, self._device, self._steps = base, pixels, device, steps

    def settings(self, *overrides: str) -> DreamBoothConfig:
        usual = (f"train.max_train_steps={self._steps}", "train.micro_batch_size=1", "train.log_every=10")
        return configuration(self._base, *usual, *overrides)

    def model(self, settings: DreamBoothConfig, *, bf16_weights: bool = False) -> DreamBoothModel:
        # On a CPU, where this is only tried, products in bf16 take minutes.
        autocast = bf16_weights or self._device == "cuda"
        return random_model(self._base, settings, device=self._device, autocast=autocast)

    def data(self) -> TrainingData:
        text = family_of(self._base).tokenize(self._base, ["a photo of a dog"])
        return random_data(self._base, self._pixels, text, text)

    def clear(self) -> None:
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> Figures:
        """What tensors took at most, and what PyTorch had reserved for them and for graphs."""
        if self._device != "cuda":
            return {}
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_gib": round(allocated / GIB, 2), "reserved_gib": round(reserved / GIB, 2)}

    def loop_efficiency(self) -> Figures:
        settings = self.settings()
        model = self.model(settings)
        engine = TorchEngine(model, settings.train, self._device)
        data = self.data()
        bare = bare_loop(model, data, settings, self._device)
        return efficiency(*take_turns(self._steps, ROUNDS, bare, fitted(engine, data, settings)))

    def plain(self, *overrides: str, channels_last: bool = False) -> Figures:
        settings = self.settings(*overrides)
        model = self.model(settings)
        if channels_last:
            model.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self._rate(TorchEngine(model, settings.train, self._device), settings)

    def graphed(self, *overrides: str) -> Figures:
        """TorchEngine with `train.graph`, by the way of a lane; `not_graphed` has the reasons where it was not."""
        engine, settings, said = self._engine_of_a_lane("train.graph=auto", *overrides)
        return self._rate(engine, settings) | {"not_graphed": said}

    def deepspeed(self, zero: ZeroConfig, *overrides: str) -> Figures:
        from pipelines.worker.deepspeed_engine import DeepSpeedEngine

        settings = self.settings(*overrides)
        model = self.model(settings, bf16_weights=zero.weights == "bf16")
        engine = DeepSpeedEngine(model, settings.train, zero, self._device)
        try:
            return self._rate(engine, settings)
        finally:
            engine.close()

    def whole_run(self, steps: int, folder: Path) -> Figures:
        """The paper's run, logged at every step as by default, with two checkpoints on a disk."""
        overrides = (f"train.max_train_steps={steps}", f"train.checkpoint_every={2 * steps // 5}", "train.log_every=1")
        engine, settings, said = self._engine_of_a_lane("train.graph=auto", *overrides)
        messages, history = list[Message](), History()
        with tempfile.TemporaryDirectory(dir=folder) as place:
            checkpoints = StoredCheckpoints(f"{place}/checkpoints", need_bytes=0, warn=print)
            hook = Checkpoint(checkpoints, engine, history, settings.train, messages.append, lambda here: here)

            def on_step(step: int, metrics: StepMetrics | None) -> None:
                history.step = step
                hook.on_step(step, metrics)

            began = time.perf_counter()
            try:
                fit(engine, self.data(), settings.train, on_step=on_step)
                hook.settle()
                seconds = time.perf_counter() - began
            finally:
                hook.abandon()
                engine.close()
        return {
            "steps": steps,
            "seconds": round(seconds, 2),
            "checkpoints": len(messages),
            "whole_after_seconds": [round(message["seconds"], 2) for message in messages],
            "updates_waited_seconds": round(engine.snapshot_seconds_waited, 3),
            "not_graphed": said,
            **self.peak(),
        }

    def run_of_a_lane(self, *, graph: str) -> tuple[Callable[[], None], list[str]]:
        """A round of steps of a lane's engine, and where the reasons come why it is not graphed."""
        engine, settings, said = self._engine_of_a_lane(f"train.graph={graph}")
        return fitted(engine, self.data(), settings), said

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
            rates = images_per_second(Path(folder), self._pixels, self._device)
        return rates | self.peak()

    def _engine_of_a_lane(self, *overrides: str) -> tuple[TorchEngine, DreamBoothConfig, list[str]]:
        """The engine that a lane of one worker makes, its settings, and where the reasons come for no graphs."""
        usual = (f"train.max_train_steps={self._steps}", "train.micro_batch_size=1", "train.log_every=10")
        plan = plan_of_weightless(self._base, self._pixels, "engine=torch", *usual, *overrides, gpus=1)
        said: list[str] = []
        model = self.model(plan.config)
        engine = Graphs(said.append).engine(model, train_task(plan, None), self._device, 1)
        return engine or TorchEngine(model, plan.config.train, self._device), plan.config, said

    def _rate(self, engine: Any, settings: DreamBoothConfig) -> Figures:
        """Steps per second by wall clock, memory, and what the device is busy with."""
        run = fitted(engine, self.data(), settings)
        [rates] = take_turns(self._steps, ROUNDS, run)
        rate, peak = statistics.median(rates), self.peak()
        return {"steps_per_second": round(rate, 2)} | peak | step_profile(run, self._steps / rate)
