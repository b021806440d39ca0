"""Subjects of every family in one `batch`, one lane; then its models by `generate`, `serve`, `evaluate` and MLflow."""

import base64
import io
import json
import shutil
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from replicas import built, cascade
from replicas.plain import plain_pipeline

from dreambooth.models.families import family_of
from dreambooth.sampling.sampler import further_seed, load_pipeline, sample
from pipelines.apps.serve.app import ServeSettings, application
from pipelines.apps.serve.subjects import find_subjects
from pipelines.cli import main
from pipelines.storage.publications import read_manifest
from pipelines.tracking.client import connect, default_tracking, quietly

SUBJECTS = {
    "sdxl": "stable-diffusion-xl",
    "sd3": "stable-diffusion-3.5",
    "flux": "flux-dev",
    "pixart": "pixart-sigma",
    "cascade": "deepfloyd-if",
}
"""Replicas by subject; the last is of two stages."""
IDENTIFIERS = dict(zip(SUBJECTS, ("sks", "kgk", "wrw", "bkb", "fkf"), strict=True))
STEPS, SIDE, SEED = 2, 64, 7
PROMPT = "a photo of [V] dog on the beach"
SAMPLING: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}
MEASURED = ["a photo of [V] {class_noun}"]
COMMON: dict[str, Any] = {
    "train": {"max_train_steps": STEPS},
    "prior": {"num_class_images": 2, "num_inference_steps": 2},
    "evaluation": {
        "protocol": "own",
        "bank": "miniature",
        "image_encoder": "miniature",
        "prompts": MEASURED,
        "images_per_prompt": 1,
        "num_inference_steps": 2,
    },
    "cluster": {"lanes": 1},
}


def dreambooth(*arguments: str) -> str:
    """A command, in this process and with the Ray that is there."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def base_of(name: str, folder: Path) -> dict[str, Any]:
    """Settings of a base model whose pictures have 64 pixels a side."""
    if name != "cascade":
        return {"base_model": str(built(SUBJECTS[name], folder / name)), "images.resolution": SIDE}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small, large = cascade.build(folder / name)
    second = {"base_model": str(large), "max_train_steps": STEPS}
    return {"base_model": str(small), "super_resolution": second}


@pytest.fixture(scope="module")
def folder(ray_session: None, tracking_in: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the batch ran: photographs, bases, results below `out`, and MLflow's database."""
    folder = tmp_path_factory.mktemp("families")
    subjects = []
    for number, name in enumerate(SUBJECTS):
        photographs = folder / "photographs" / name
        photographs.mkdir(parents=True)
        for place in range(2):
            pixels = np.random.default_rng([number, place]).integers(0, 256, (80, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photographs / f"{place}.png")
        subject = {
            "name": name,
            "class_noun": "dog",
            "identifier": IDENTIFIERS[name],
            "instance_images": str(photographs),
        }
        subjects.append(subject | base_of(name, folder / "bases"))
    places = {"storage": {"root": str(folder / "out")}, "tracking": {"uri": tracking_in(folder)}}
    (folder / "subjects.yaml").write_text(yaml.safe_dump(COMMON | places | {"subjects": subjects}))
    dreambooth("batch", str(folder / "subjects.yaml"), "--quiet")
    return folder


def tracking(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def summary_of(folder: Path, name: str) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "out" / name / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[str]:
    """The address of one service for all of them."""
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = ServeSettings(
        base_shared=True, replicas=1, subjects_loaded=2, batch=8, queue=32, use_gpu=False, loopback=True
    )
    uri = tracking(folder)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(find_subjects("models:/dreambooth-*@latest", uri), uri, settings), route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def pixels(picture: Any) -> Any:
    return np.asarray(picture, dtype=int)


def decoded(png: str) -> Any:
    return pixels(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


def drawn_plainly(model: Path, prompt: str) -> Any:
    """The picture of diffusers' own pipelines, with the product's samplers."""
    ours, further = load_pipeline(model), dict[str, Any]()
    stages = [(model, ours, SEED, SAMPLING["guidance_scale"], {"height": SIDE, "width": SIDE})]
    if (second := getattr(ours, "super_resolution", None)) is not None:
        small = (model, ours, SEED, SAMPLING["guidance_scale"], {})
        stages = [small, (model / "super_resolution", second, further_seed(SEED), 4.0, {})]
    for directory, own, seed, scale, size in stages:
        plain, generator = plain_pipeline(directory), torch.Generator().manual_seed(seed)
        plain.scheduler = own.scheduler
        given = SAMPLING | family_of(directory).call_arguments(scale) | size | further
        given = {name: value for name, value in given.items() if value is not None}
        further = {"image": plain(prompt, generator=generator, **given).images}
    return pixels(further["image"][0])


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_model_draws_the_same_picture_everywhere(name: str, folder: Path, service: str) -> None:
    summary, uri = summary_of(folder, name), tracking(folder)
    model = Path(summary["model_uri"])
    assert read_manifest(str(model)).metadata["step"] == STEPS
    assert summary["registered_model"] == f"dreambooth-{name}"
    address = f"models:/dreambooth-{name}@latest"
    pipeline, prompt = load_pipeline(model), PROMPT.replace("[V]", IDENTIFIERS[name])
    # In fp32, as plain diffusers computes: what bf16 rounds, two stages with random weights make anything of.
    [precise] = sample(pipeline, [prompt], [SEED], dtype=torch.float32, **SAMPLING)
    assert precise.size == (SIDE, SIDE)
    assert abs(pixels(precise) - drawn_plainly(model, prompt)).max() <= 2
    [ours] = sample(pipeline, [prompt], [SEED], **SAMPLING)

    asked = {"subject": name, "prompt": PROMPT, "num": 1, "seed": SEED, **SAMPLING}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{service}/generate", json.dumps(asked).encode(), headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as answer:
        [served] = json.load(answer)["images"]
    assert abs(decoded(served) - pixels(ours)).max() <= 1

    options = ("--num", "1", "--seed", str(SEED), "--steps", "2", "--guidance", "3", "--tracking-uri", uri)
    dreambooth("generate", "--model", address, PROMPT, *options)
    with Image.open(Path("generated", f"{SEED}.png")) as image:
        assert abs(pixels(image.convert("RGB")) - pixels(ours)).max() <= 1
    with quietly(), default_tracking(uri):
        from mlflow import pyfunc

        connect(uri)
        loaded = pyfunc.load_model(f"models:/dreambooth-{name}/1")
        answered = loaded.predict(pd.DataFrame({"prompt": [PROMPT]}), params={"seed": SEED, **SAMPLING})
    assert abs(decoded(answered["image"][0]) - pixels(ours)).max() <= 2


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_model_measured_again_has_the_figures_of_its_batch(name: str, folder: Path, tmp_path: Path) -> None:
    recorded = Path(summary_of(folder, name)["evaluation"]["uri"])
    figures = json.loads(recorded.read_text())["figures"]
    assert figures["dino"]["mean"] is not None
    shutil.rmtree(recorded.parent)
    shutil.rmtree(folder / "out" / "prior" / "base-samples", ignore_errors=True)
    (tmp_path / "prompts.txt").write_text("\n".join(MEASURED))
    options = ("--prompts", str(tmp_path / "prompts.txt"), "--images-per-prompt", "1", "--bank", "miniature")
    photographs = ("--instance-images", str(folder / "photographs" / name))
    model = ("--model", f"models:/dreambooth-{name}@latest", "--tracking-uri", tracking(folder))
    told = dreambooth("evaluate", *model, *photographs, *options, "--set", "prior.num_actors=1", "--quiet")
    assert str(recorded) in told
    for what, figure in json.loads(recorded.read_text())["figures"].items():
        assert figure["mean"] == pytest.approx(figures[what]["mean"], abs=1e-5), what
