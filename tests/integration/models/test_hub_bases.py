"""Stable Diffusion 1.5 and 2.1 as they lie in the hub's cache, from `batch` to pictures: one lane goes through both."""

import base64
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from hub_repositories import IDS, RESOLUTION, write_hub_cache
from PIL import Image

from dreambooth.config.settings import StorageConfig
from dreambooth.miniature import subject_dir
from dreambooth.models.base_model import resolve_base_model
from dreambooth.sampling.sampler import load_pipeline, sample
from pipelines.apps.generate import generate
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.run_plan import make_plan
from pipelines.plan.subject_list import read_batch
from pipelines.stages.evaluate_stage import base_samples_uri
from pipelines.storage.publications import published
from pipelines.tasks import picture_name
from pipelines.tracking.client import default_tracking, quietly

SUBJECTS = {"sd15": "coral-car", "sd21": "navy-dog"}
TRAINED_AT = 64


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    cache = tmp_path_factory.mktemp("huggingface") / "hub"
    return {name: write_hub_cache(cache, name) for name in IDS}


@pytest.fixture(autouse=True)
def _hub(snapshots: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = snapshots["sd15"].parents[2]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))


@pytest.fixture(scope="module")
def folder(
    snapshots: dict[str, Path], tracking_in: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Where one batch of both bases was run, each trained at half of its size."""
    folder = tmp_path_factory.mktemp("batch")
    tracking_in(folder)
    common: dict[str, Any] = {
        "prior": {"num_class_images": 4, "num_inference_steps": 2, "batch_size": 4},
        "images": {"resolution": TRAINED_AT},
        "train": {"max_train_steps": 2},
        "evaluation": {
            "protocol": "own",
            "bank": "miniature",
            "image_encoder": "miniature",
            "prompts": ["a photo of [V] {class_noun}"],
            "images_per_prompt": 2,
            "num_inference_steps": 2,
        },
        "cluster": {"num_workers": 1, "lanes": 1},
        "storage": {"root": str(folder / "out")},
    }
    subjects = [
        {
            "name": name,
            "class_noun": name.rsplit("-", 1)[-1],
            "identifier": f"{'tr'[place]}fz",
            "instance_images": str(subject_dir(name)),
            "base_model": IDS[base],
        }
        for place, (base, name) in enumerate(SUBJECTS.items())
    ]
    (folder / "subjects.yaml").write_text(yaml.safe_dump(common | {"subjects": subjects}))
    environment = os.environ | {
        "HF_HUB_CACHE": str(snapshots["sd15"].parents[2]),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
    command = [sys.executable, "-m", "pipelines.cli", "batch", "subjects.yaml"]
    done = subprocess.run(
        command, cwd=folder, check=False, timeout=550, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    return folder


def pixels(picture: "Image.Image | bytes | str | Path") -> npt.NDArray[np.int16]:
    opened = (
        picture
        if isinstance(picture, Image.Image)
        else Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
    )
    return np.asarray(opened, dtype=np.int16)


def model_of(folder: Path, base: str) -> Any:
    manifest = published(str(folder / "out" / SUBJECTS[base] / "model"))
    assert manifest is not None
    return manifest


def test_the_plan_names_both_bases(folder: Path) -> None:
    words = " ".join((folder / "output.txt").read_text().split())
    for base in IDS:
        assert re.search(rf"{IDS[base]}, hash {resolve_base_model(IDS[base]).hash}: 1 subject\b", words)


@pytest.mark.parametrize("base", IDS)
def test_the_samples_of_a_base_are_its_own(base: str, folder: Path) -> None:
    configs = [one.config for one in read_batch(str(folder / "subjects.yaml"))]
    [config] = [one for one in configs if one is not None and one.base_model == IDS[base]]
    plan = make_plan(
        config.model_copy(update={"storage": StorageConfig(root=str(folder / "out"))}), Resources(cpus=1, gpus=0)
    )
    assert plan.protocol is not None
    pipeline = load_pipeline(plan.base.directory, device="cpu", dtype=torch.float32)
    for pictures in plan.protocol.base_sets:
        made = sample(
            pipeline,
            pictures.prompts,
            pictures.seeds,
            num_inference_steps=pictures.num_inference_steps,
            guidance_scale=pictures.guidance_scale,
            height=TRAINED_AT,
            width=TRAINED_AT,
            dtype=getattr(torch, pictures.dtype),
        )
        for place, one in enumerate(made):
            stored = pixels(Path(base_samples_uri(plan.protocol, pictures), picture_name(place)))
            assert np.abs(stored - pixels(one)).max() <= 1


@pytest.mark.parametrize("base", IDS)
def test_a_model_of_it_draws_at_the_size_it_was_trained_at_whoever_loads_it(base: str, folder: Path) -> None:
    tracking = f"sqlite:///{folder}/mlflow.db"
    models = {"published": model_of(folder, base).uri, "registered": f"models:/dreambooth-{SUBJECTS[base]}@latest"}
    settings: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 4.0}
    with quietly():
        import mlflow.pyfunc

        drawn = {}
        for what, model in models.items():
            made = generate(model, "a photo of [V]", num=1, output=what, tracking_uri=tracking, **settings)
            drawn[what] = pixels(made.paths[0])
        with default_tracking(tracking):
            served = mlflow.pyfunc.load_model(models["registered"])
        answer = served.predict(pd.DataFrame({"prompt": ["a photo of [V]"]}), settings)
        plain = StableDiffusionPipeline.from_pretrained(models["published"], local_files_only=True)
    drawn["served"] = pixels(base64.b64decode(answer["image"][0]))
    for what, picture in drawn.items():
        assert picture.shape == (TRAINED_AT, TRAINED_AT, 3), what
        assert np.abs(picture - drawn["published"]).max() <= 1, what
    latents = plain("a photo", num_inference_steps=1, output_type="latent").images
    assert latents.shape[-1] == TRAINED_AT // 4


@pytest.mark.parametrize("base", IDS)
def test_the_snapshots_folder_is_the_same_base(base: str, snapshots: dict[str, Path]) -> None:
    by_id, by_folder = resolve_base_model(IDS[base]), resolve_base_model(str(snapshots[base]))
    assert by_id.hash == by_folder.hash
    assert by_id.resolution == by_folder.resolution == RESOLUTION
    assert resolve_base_model(IDS[base], snapshots[base].name).hash == by_id.hash
    assert not (by_id.directory / "feature_extractor").exists()
