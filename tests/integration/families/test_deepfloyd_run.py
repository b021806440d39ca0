"""DeepFloyd IF's stage I through the commands a user types: fine-tuned, registered, sampled here and by MLflow."""

import base64
import io
import json
import os
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

from pipelines.storage.publications import read_manifest

COMMAND = str(Path(sys.executable).with_name("dreambooth"))
SETTINGS = (
    "subject.name=rex",
    "subject.class_noun=dog",
    "subject.identifier=sks",
    "train.max_train_steps=2",
    "train.learning_rate=1e-3",
    "prior.num_class_images=2",
    "prior.num_inference_steps=2",
    'evaluation.prompts=["a photo of [V] dog"]',
    "evaluation.images_per_prompt=1",
    "evaluation.num_inference_steps=2",
)


def dreambooth(*arguments: str) -> str:
    process = subprocess.run(
        [COMMAND, *arguments], check=False, capture_output=True, text=True, timeout=600, env=os.environ
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run in `run`, and its base."""
    folder = tmp_path_factory.mktemp("deepfloyd")
    for name in ("base", "photos"):
        (folder / name).mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        REPLICAS["deepfloyd-if"](folder / "base")
    for place in range(2):
        Image.radial_gradient("L").rotate(90 * place).convert("RGB").save(folder / "photos" / f"{place}.png")
    arguments = ["--images", str(folder / "photos"), "--base-model", str(folder / "base")]
    arguments += ["--output", str(folder / "run")]
    for setting in (*SETTINGS, f"storage.prior={folder}/prior", f"tracking.uri=sqlite:///{folder}/mlflow.db"):
        arguments += ["--set", setting]
    dreambooth("run", *arguments)
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return summary


def test_its_publication_is_a_plain_pipeline(folder: Path) -> None:
    manifest = read_manifest(summary_of(folder)["model_uri"])
    published = plain_pipeline(Path(manifest.uri.removeprefix("file://")))
    assert published.scheduler.config.variance_type == "fixed_small"
    base = plain_pipeline(folder / "base")
    changed = {
        name
        for name, weight in published.unet.named_parameters()
        if not torch.equal(weight, base.unet.get_parameter(name))
    }
    assert "conv_in.weight" in changed
    bias = published.unet.conv_out.bias
    assert torch.equal(bias[3:], base.unet.conv_out.bias[3:])
    assert not torch.equal(bias[:3], base.unet.conv_out.bias[:3])


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
def test_mlflow_serves_the_pictures_that_generate_writes(folder: Path) -> None:
    from pipelines.tracking.client import default_tracking, quietly

    address, uri = "models:/dreambooth-rex/1", f"sqlite:///{folder}/mlflow.db"
    arguments = ["--model", address, "--prompt", "a photo of [V] dog", "--num", "1", "--seed", "7"]
    dreambooth("generate", *arguments, "--output", str(folder / "generated"), "--tracking-uri", uri)
    generated = np.asarray(Image.open(folder / "generated" / "7.png"), dtype=int)
    assert generated.shape == (16, 16, 3)
    assert generated.std() > 1
    with quietly(), default_tracking(uri):
        from mlflow import pyfunc

        answer = pyfunc.load_model(address).predict(pd.DataFrame({"prompt": ["a photo of [V] dog"]}), {"seed": 7})
    served = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["image"][0]))), dtype=int)
    assert abs(served - generated).max() <= 1
