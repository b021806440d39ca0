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
from replicas import REPLICAS
from replicas.plain import plain_pipeline

from dreambooth.sampling.sampler import load_pipeline
from pipelines.storage.publications import read_manifest
from pipelines.tracking.client import connect, default_tracking, quietly

COMMAND = str(Path(sys.executable).with_name("dreambooth"))
SETTINGS = [
    "train.max_train_steps=2",
    "prior.num_class_images=2",
    "prior.num_inference_steps=2",
    "evaluation.images_per_prompt=1",
    "evaluation.num_inference_steps=2",
    "images.resolution=64",
]
PROMPT = "a photo of [V] dog on the beach"
SAMPLING: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}


def dreambooth(*arguments: str) -> str:
    finished = subprocess.run(
        [COMMAND, *arguments], check=False, capture_output=True, text=True, timeout=500, env=os.environ
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(params=["stable-diffusion-xl", "stable-diffusion-3.5", "deepfloyd-if"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    torch.manual_seed(0)
    REPLICAS[request.param](folder)
    return folder


def pixels(picture: Any) -> Any:
    return np.asarray(picture, dtype=int)


def test_a_run_ends_registered_and_samples_the_same_picture_everywhere(
    base: Path, tmp_path: Path, mlflow_database: str
) -> None:
    photographs = tmp_path / "rex"
    photographs.mkdir()
    for place in range(2):
        Image.effect_noise((96, 80), 80).convert("RGB").save(photographs / f"{place}.png")
    shutil.copyfile(mlflow_database.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    arguments = ["--base-model", str(base), "--images", str(photographs), "--class-noun", "dog", "--identifier", "sks"]
    settings = [*SETTINGS, f"storage.prior={tmp_path}/prior", f"tracking.uri={uri}"]
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

    plain = plain_pipeline(Path(model))
    plain.scheduler = load_pipeline(Path(model)).scheduler
    generator = torch.Generator().manual_seed(7)
    expected = pixels(plain(PROMPT.replace("[V]", "sks"), generator=generator, **SAMPLING).images[0])
    with quietly(), default_tracking(uri):
        from mlflow import pyfunc

        connect(uri)
        served = pyfunc.load_model(f"models:/{summary['registered_model']}/1")
        answer = served.predict(pd.DataFrame({"prompt": [PROMPT]}), params={"seed": 7, **SAMPLING})
    with Image.open(io.BytesIO(base64.b64decode(answer["image"][0]))) as image:
        found = pixels(image)
    # On a CPU that multiplies bf16 both compute in it; the plain pipeline in fp32.
    assert abs(found - generated).max() <= 2
    assert abs(found - expected).max() <= 24
    assert abs(found - expected).mean() < 3
