"""One service for several subjects, on a real Ray Serve: what it answers, when it refuses, and its page."""

import base64
import json
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from chromium import needs_browser, open_browser
from safetensors.torch import load_file, save_file

from dreambooth.base_model import resolve_base_model
from dreambooth.config import TrackingConfig
from dreambooth.delta import write_delta
from dreambooth.errors import InputError
from dreambooth.images import png_bytes
from dreambooth.sampling import load_pipeline, sample
from pipelines.mlflow_client import connect
from pipelines.registry import register
from pipelines.serve_subjects import find_subjects
from pipelines.tracking import check_tracking, track

IDENTIFIERS = {"rex": "zqx", "mug": "tfz"}
PATTERN = "models:/dreambooth-*@champion"
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def fine_tuned(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of one base, each another denoiser."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for number, name in enumerate(IDENTIFIERS, start=1):
        found[name] = Path(shutil.copytree(tiny_pipeline, folder / name))
        weights = found[name] / "unet" / "diffusion_pytorch_model.safetensors"
        noise = torch.Generator().manual_seed(number)
        moved = {
            key: value + 0.05 * torch.randn(value.shape, generator=noise) for key, value in load_file(weights).items()
        }
        save_file(moved, weights, {"format": "pt"})
    return found


@pytest.fixture(scope="module")
def tracking_uri(tiny_pipeline: Path, fine_tuned: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry with both, the second as its change against the base; and one model that is no champion."""
    uri = check_tracking(TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"))
    base, client = resolve_base_model(str(tiny_pipeline)), connect(uri)
    changes = tmp_path_factory.mktemp("delta") / "mug"
    write_delta(base, fine_tuned["mug"], changes)
    for name, directory in (("rex", fine_tuned["rex"]), ("mug", changes), ("new", fine_tuned["rex"])):
        with track(TrackingConfig(uri=uri), run_name=name) as run:
            version = register(
                run_id=run.run_id,
                tracking_uri=uri,
                model_directory=directory,
                name=f"dreambooth-{name}",
                tags={"base_model": base.address, "base_hash": base.hash},
                identifier=IDENTIFIERS.get(name, "xkq"),
                class_noun="dog",
                result_key=name,
                num_inference_steps=2,
                guidance_scale=4.0,
            )
        if name in IDENTIFIERS:
            client.set_registered_model_alias(version.name, "champion", str(version.version))
    return uri


@pytest.fixture(scope="module")
def service(tracking_uri: str, ray_session: None) -> Iterator[str]:
    """The address of a service that has room for one subject, samples one request after the other and lets one wait."""
    from ray import serve

    from pipelines.serve_app import ServeSettings, application

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = ServeSettings(
        base_shared=True, replicas=1, subjects_loaded=1, batch=1, queue=1, use_gpu=False, loopback=True
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(find_subjects(PATTERN, tracking_uri), tracking_uri, settings), name="dreambooth")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def ask(address: str, body: dict[str, Any] | None = None, **headers: str) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json", **headers})
    try:
        with _OPENER.open(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            content = error.read().decode()
            return error.code, json.loads(content) if content.startswith("{") else content


def test_subjects_come_and_go_over_one_base(service: str, fine_tuned: dict[str, Path]) -> None:
    status, subjects = ask(f"{service}/subjects")
    assert status == 200
    assert [(each["subject"], each["identifier"]) for each in subjects] == [("mug", "tfz"), ("rex", "zqx")]
    for name in ("rex", "mug", "rex"):  # there is room for one
        status, made = ask(
            f"{service}/generate", {"subject": name, "prompt": "a photo of [V] dog", "num": 2, "seed": 3}
        )
        assert status == 200, made
        assert made["seeds"] == [3, 4]
        pipeline = load_pipeline(fine_tuned[name], device="cpu", dtype=torch.float32)
        prompt = f"a photo of {IDENTIFIERS[name]} dog"
        expected = sample(pipeline, [prompt] * 2, [3, 4], num_inference_steps=2, guidance_scale=4.0)
        assert [base64.b64decode(image) for image in made["images"]] == [png_bytes(image) for image in expected]


def test_it_says_what_is_wrong_with_a_request(service: str) -> None:
    good = {"subject": "rex", "prompt": "a photo of [V] dog"}
    status, answer = ask(f"{service}/generate", good | {"subject": "new"})
    assert (status, answer["detail"]) == (404, "there is no subject 'new' here; there are mug, rex")
    for wrong in ({"prompt": ""}, {"num": 9}, {"seed": -1}, {"num_inference_steps": 0}):
        assert ask(f"{service}/generate", good | wrong)[0] == 422
    assert ask(f"{service}/subjects", Host="evil.example")[0] == 400
    assert ask(f"{service}/healthz") == (200, {"status": "ok"})
    assert set(ask(f"{service}/openapi.json")[1]["paths"]) == {"/healthz", "/subjects", "/generate"}


def test_more_than_may_wait_are_sent_away(service: str) -> None:
    body = {"subject": "rex", "prompt": "a photo of [V] dog", "num_inference_steps": 100}
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda seed: ask(f"{service}/generate", body | {"seed": seed}), range(12)))
    assert {status for status, _ in answers} == {200, 429}
    assert ask(f"{service}/generate", body)[0] == 200


@needs_browser
def test_a_prompt_is_typed_and_images_are_seen(service: str, tmp_path: Path) -> None:
    with open_browser(tmp_path / "profile") as page:
        page.open(service)
        page.until("!document.getElementById('go').disabled")
        assert page.run("return document.getElementById('prompt').value") == "a photo of [V] dog"
        page.click("#go")
        page.until("[...document.querySelectorAll('figure img')].filter(image => image.naturalWidth > 0).length == 4")
        assert "models:/dreambooth-mug/1" in page.run("return document.querySelector('figcaption').textContent")
        page.run("document.getElementById('prompt').value = ' '.repeat(3)")
        page.run("document.getElementById('seed').value = '-1'")
        assert not page.run("return document.getElementById('form').checkValidity()")
        assert page.console() == []


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("dreambooth-*", "expected models:/NAME@ALIAS"),
        ("models:/dreambooth-*@", "expected models:/NAME@ALIAS"),
        ("models:/cat-*@champion", "none has such a name"),
        ("models:/dreambooth-new@champion", "1 match its name"),
    ],
)
def test_models_that_are_not_there(tracking_uri: str, pattern: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_subjects(pattern, tracking_uri)
    assert [one.address for one in find_subjects("models:/dreambooth-new@latest", tracking_uri)] == [
        "models:/dreambooth-new/1"
    ]
