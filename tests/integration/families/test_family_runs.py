"""A base model of each family through the whole job: a run, pictures from the registry, and what MLflow serves."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from replicas import REPLICAS, cascade
from replicas.plain import plain_pipeline

from dreambooth.sampling.sampler import further_seed, load_pipeline, sample
from pipelines.storage.publications import read_manifest
from pipelines.tracking.client import connect, default_tracking, quietly

COMMAND = str(Path(sys.executable).with_name("dreambooth"))
SETTINGS = [
    "train.max_train_steps=2",
    "prior.num_class_images=2",
    "prior.num_inference_steps=2",
    "evaluation.images_per_prompt=1",
    "evaluation.num_inference_steps=2",
]
PROMPT = "a photo of [V] dog on the beach"
SAMPLING: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}


def dreambooth(*arguments: str) -> str:
    finished = subprocess.run(
        [COMMAND, *arguments], check=False, capture_output=True, text=True, timeout=500, env=os.environ
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(params=["stable-diffusion-xl", "stable-diffusion-3.5", "deepfloyd-if in two stages"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[str]]:
    """A base model's folder, and settings that suit it: its pictures have 64 pixels a side."""
    folder = tmp_path / "base"
    torch.manual_seed(0)
    if request.param in REPLICAS:
        folder.mkdir()
        REPLICAS[request.param](folder)
        return folder, ["images.resolution=64"]
    small, large = cascade.build(folder)
    return small, [f"super_resolution.base_model={large}", "super_resolution.max_train_steps=2"]


def pixels(picture: Any) -> Any:
    return np.asarray(picture, dtype=int)


def drawn_plainly(model: Path) -> Image.Image:
    """The picture of diffusers' own pipelines."""
    ours, prompt, further = load_pipeline(model), PROMPT.replace("[V]", "sks"), {}
    stages = [(model, ours, 7, SAMPLING["guidance_scale"])]
    if (second := getattr(ours, "super_resolution", None)) is not None:
        stages.append((model / "super_resolution", second, further_seed(7), 4.0))
    for directory, own, seed, scale in stages:
        plain, generator = plain_pipeline(directory), torch.Generator().manual_seed(seed)
        plain.scheduler = own.scheduler
        given = SAMPLING | {"guidance_scale": scale, **further}
        further = {"image": plain(prompt, generator=generator, **given).images}
    picture: Image.Image = further["image"][0]
    return picture


def test_a_run_ends_registered_and_samples_the_same_picture_everywhere(
    base: tuple[Path, list[str]], tmp_path: Path, mlflow_database: str
) -> None:
    folder, suited = base
    photographs = tmp_path / "rex"
    photographs.mkdir()
    for place in range(2):
        Image.effect_noise((96, 80), 80).convert("RGB").save(photographs / f"{place}.png")
    shutil.copyfile(mlflow_database.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    arguments = [
        "--base-model",
        str(folder),
        "--images",
        str(photographs),
        "--class-noun",
        "dog",
        "--identifier",
        "sks",
    ]
    settings = [*SETTINGS, *suited, f"storage.prior={tmp_path}/prior", f"tracking.uri={uri}"]
    given = [part for setting in settings for part in ("--set", setting)]
    dreambooth("run", *arguments, "--output", str(tmp_path / "run"), *given)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    model = summary["model_uri"]
    assert read_manifest(model).metadata["step"] == 2

    options = ["--num", "1", "--seed", "7", "--steps", "2", "--guidance", "3", "--tracking-uri", uri]
    dreambooth("generate", "--model", f"models:/{summary['registered_model']}@latest", PROMPT, *options)
    with Image.open(Path("generated", "7.png")) as image:
        generated = pixels(image.convert("RGB"))
    assert generated.shape == (64, 64, 3)

    expected = pixels(drawn_plainly(Path(model)))
    with quietly(), default_tracking(uri):
        from mlflow import pyfunc

        connect(uri)
        served = pyfunc.load_model(f"models:/{summary['registered_model']}/1")
        answer = served.predict(pd.DataFrame({"prompt": [PROMPT]}), params={"seed": 7, **SAMPLING})
    with Image.open(io.BytesIO(base64.b64decode(answer["image"][0]))) as image:
        found = pixels(image)
    assert abs(found - generated).max() <= 2
    # In fp32, as plain diffusers computes: what bf16 rounds, two stages with random weights make anything of.
    ours = sample(load_pipeline(Path(model)), [PROMPT.replace("[V]", "sks")], [7], dtype=torch.float32, **SAMPLING)
    assert abs(pixels(ours[0]) - expected).max() <= 2
