"""What does the pipeline cost over the bare work? `make bench` measures it and writes output/bench/main.json.

- loop_efficiency: steps per second of `fit` with TorchEngine over those of a bare loop (same model, batch and
  optimizer; no data loading, logging or checkpoints). The two take turns in one process, since machines are noisy.
- prior_speedup: class images per second of `ImageSampler`, which lanes make them with, in two processes over those of
  plain diffusers in one with two threads. Neither starting processes nor loading the pipeline is counted.
- startup_seconds: from `dreambooth run` to the end of the first training step, by what it goes into.
- single_worker: steps per second of the two engines with one worker, which is what `engine: auto` rests on.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from loops import bare_loop, efficiency, fitted, random_data, take_turns
from stamps import Figures, stamp, stamped, together

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.batches import TrainingData
from dreambooth.miniature import PIPELINE_DIR, subject_dir
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.families import family_of
from dreambooth.quiet import quiet
from dreambooth.sampling.class_images import PriorPlan, image_seed, prior_plan
from dreambooth.sampling.sampler import load_pipeline
from dreambooth.training.engine import TorchEngine
from dreambooth.training.model import load_model

OUTPUT = Path("output/bench/main.json")
ROUNDS, STEPS = 7, 20
CLASS_IMAGES = 96


def config(**overrides: Any) -> DreamBoothConfig:
    subject = {
        "name": "bench",
        "class_noun": "car",
        "identifier": "tfz",
        "instance_images": str(subject_dir("coral-car")),
    }
    return load_config({"subject": subject}, tuple(f"{name}={value}" for name, value in overrides.items()))


def training_data() -> TrainingData:
    texts = family_of(PIPELINE_DIR).tokenize(PIPELINE_DIR, ["a photo of tfz car", "a photo of a car"])
    first, second = ({name: part[half] for name, part in texts.items()} for half in (slice(1), slice(1, None)))
    return random_data(PIPELINE_DIR, 64, first, second)


def loop_efficiency() -> dict[str, float]:
    torch.set_num_threads(2)
    settings = config(**{"train.max_train_steps": STEPS, "train.micro_batch_size": 1, "train.log_every": 1})
    data = training_data()
    engine = TorchEngine(load_model(PIPELINE_DIR, settings), settings.train)
    bare = bare_loop(load_model(PIPELINE_DIR, settings), data, settings)
    return efficiency(*take_turns(STEPS, ROUNDS, bare, fitted(engine, data, settings)))


def single_worker() -> dict[str, float]:
    from pipelines.worker.deepspeed_engine import DeepSpeedEngine

    torch.set_num_threads(1)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    settings = config(**{"train.max_train_steps": STEPS, "train.micro_batch_size": 1})
    data = training_data()
    plain = TorchEngine(load_model(PIPELINE_DIR, settings), settings.train)
    zero = DeepSpeedEngine(load_model(PIPELINE_DIR, settings), settings.train, settings.zero, "cpu")
    torch_rates, zero_rates = take_turns(STEPS, ROUNDS, fitted(plain, data, settings), fitted(zero, data, settings))
    return {"torch": round(statistics.median(torch_rates), 2), "deepspeed": round(statistics.median(zero_rates), 2)}


def prior_speedup() -> dict[str, float]:
    import ray

    from dreambooth.config.settings import ClusterConfig
    from dreambooth.sampling.best_dtype import best_dtype
    from pipelines.cluster.ray_cluster import ray_cluster
    from pipelines.tasks import Source
    from pipelines.worker.samplers import ImageSampler

    settings = config(**{"prior.num_class_images": CLASS_IMAGES})
    plan = prior_plan(
        settings.prior,
        base_hash=resolve_base_model("miniature").hash,
        class_prompt="a photo of a car",
        resolution=64,
        dtype=best_dtype("cpu"),
        sampler=family_of(PIPELINE_DIR).sampler_name,
    )
    torch.set_num_threads(2)
    pipeline = load_pipeline(PIPELINE_DIR, device="cpu", dtype=torch.float32)
    pipeline.unet.to(memory_format=torch.contiguous_format)  # as diffusers loads it
    _plain_block(pipeline, plan, range(plan.batch_size))
    stage, plain = [], []

    def made(workers: list[Any], blocks: list[range], folder: str) -> list[int]:
        """Indices of images that workers made of blocks dealt to them in turn, as a lane's workers do."""
        calls = []
        for rank, worker in enumerate(workers):
            mine = blocks[rank :: len(workers)]
            calls.append(worker.class_images.remote(Source(address="miniature"), plan, mine, mine, folder))
        return [index for indices in ray.get(calls) for index in indices]

    with ray_cluster(ClusterConfig()):
        workers = [ray.remote(ImageSampler).options(num_cpus=1).remote(use_gpu=False) for _ in range(2)]
        for _ in range(3):
            blocks = plan.blocks()[:4]
            began = time.perf_counter()
            for block in blocks:
                _plain_block(pipeline, plan, block)
            plain.append(len(blocks) * plan.batch_size / (time.perf_counter() - began))
            with tempfile.TemporaryDirectory() as folder:
                made(workers, plan.blocks()[:2], folder)  # which loads the pipeline
                began = time.perf_counter()
                indices = made(workers, plan.blocks()[2:], folder)
                stage.append(len(indices) / (time.perf_counter() - began))
    return {
        "prior_speedup": round(statistics.median(s / p for s, p in zip(stage, plain, strict=True)), 2),
        "prior_images_per_second": round(statistics.median(stage), 2),
        "diffusers_images_per_second": round(statistics.median(plain), 2),
    }


def _plain_block(pipeline: StableDiffusionPipeline, plan: PriorPlan, block: range) -> None:
    """The same pictures as plain diffusers makes them: one process, fp32, the same sampler, steps and batches."""
    pipeline(
        [plan.class_prompt] * len(block),
        generator=[torch.Generator().manual_seed(image_seed(plan, index)) for index in block],
        num_inference_steps=plan.num_inference_steps,
        guidance_scale=plan.guidance_scale,
        height=plan.resolution,
        width=plan.resolution,
    )


def startup_seconds() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["train.max_train_steps=2", "evaluation.images_per_prompt=1", "evaluation.num_inference_steps=1"]
        command = [str(Path(sys.executable).with_name("dreambooth")), "run", "--images", str(subject_dir("coral-car"))]
        command += ["--class-noun", "car", "--workers", "2", "--output", f"{folder}/run", "--quiet"]
        command += ["--set", f"storage.prior={folder}/prior", "--set", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
        for override in overrides:
            command += ["--set", override]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        startup: dict[str, float] = json.loads(Path(folder, "run", "summary.json").read_text())["startup_seconds"]
    return startup


def main() -> None:
    quiet()
    parts: list[Figures] = []
    for name, measure in (
        ("loop", loop_efficiency),
        ("single_worker", single_worker),
        ("prior", prior_speedup),
        ("startup_seconds", startup_seconds),
    ):
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        at = stamp()
        measured = measure()
        parts.append(stamped({name: measured} if name in ("single_worker", "startup_seconds") else measured, at))
        print(json.dumps(measured), file=sys.stderr, flush=True)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(together(*parts), indent=2) + "\n")
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main()
