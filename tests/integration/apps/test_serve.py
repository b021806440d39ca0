"""One service for several subjects, on a real Ray Serve: what it answers, when it refuses, and its page."""

import base64
import io
import json
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import needs_browser, open_browser
from PIL import Image
from safetensors.torch import load_file, save_file
from served import facts_of

from dreambooth.config.settings import TrackingConfig
from dreambooth.data.images import png_bytes
from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.delta import write_delta
from dreambooth.sampling.sampler import load_pipeline, sample
from pipelines.apps.serve.subjects import find_subjects
from pipelines.storage.publications import publish
from pipelines.tracking.client import connect, default_tracking
from pipelines.tracking.registry import register
from pipelines.tracking.runs import check_tracking, track

IDENTIFIERS = {"rex": "zqx", "mug": "tfz", "bag": "rjs"}
SIDES = {"rex": 64, "mug": 64, "bag": 32}  # in pixels, of what they were trained at; the base's are 64
PATTERN = "models:/dreambooth-*@champion"
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def fine_tuned(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models of one base, each another denoiser."""
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
def tracking_uri(
    tiny_pipeline: Path,
    fine_tuned: dict[str, Path],
    tracking_in: Callable[[Path], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """A registry with them, one as its change against the base, one as a reference; two more that are no champions."""
    uri = check_tracking(TrackingConfig(uri=tracking_in(tmp_path_factory.mktemp("registry"))))
    base, client = resolve_base_model(str(tiny_pipeline)), connect(uri)
    changes = tmp_path_factory.mktemp("delta") / "mug"
    write_delta(base, fine_tuned["mug"], changes)
    referred = publish(fine_tuned["bag"], str(tmp_path_factory.mktemp("published")), metadata={})
    models = fine_tuned | {"mug": changes, "bag": referred, "new": fine_tuned["rex"], "old": fine_tuned["rex"]}
    for name, model in models.items():
        with track(TrackingConfig(uri=uri), run_name=name) as run:
            version = register(
                run_id=run.run_id,
                tracking_uri=uri,
                model=model,
                name=f"dreambooth-{name}",
                tags={"base_model": base.address, "base_hash": base.hash}
                | ({"resolution": SIDES[name]} if name in SIDES else {}),
                identifier=IDENTIFIERS.get(name, "xkq"),
                class_noun="dog",
                result_key=name,
                served=facts_of(tiny_pipeline),
                num_inference_steps=2,
                guidance_scale=4.0,
            )
        if name in IDENTIFIERS:
            client.set_registered_model_alias(version.name, "champion", str(version.version))
    return uri


@pytest.fixture(scope="module")
def server(ray_session: None) -> Iterator[str]:
    """The address of Ray Serve's HTTP server."""
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def service(tracking_uri: str, server: str) -> str:
    """The address of a service that has room for one subject, samples one request after the other and lets one wait."""
    return f"{server}{start(tracking_uri, 'narrow', subjects_loaded=1, batch=1, queue=1)}"


@pytest.fixture(scope="module")
def busy_service(tracking_uri: str, server: str) -> str:
    """The address of a service as it is by default, but for less room than there are subjects."""
    return f"{server}{start(tracking_uri, 'busy')}"


def start(
    tracking_uri: str, name: str, *, pattern: str = PATTERN, subjects_loaded: int = 2, batch: int = 8, queue: int = 32
) -> str:
    """Start a service; returns the path below which it answers."""
    from ray import serve

    from pipelines.apps.serve.app import ServeSettings, application

    settings = ServeSettings(
        base_shared=True,
        replicas=1,
        subjects_loaded=subjects_loaded,
        batch=batch,
        queue=queue,
        use_gpu=False,
        loopback=True,
    )
    subjects = find_subjects(pattern, tracking_uri)
    serve.run(application(subjects, tracking_uri, settings), name=name, route_prefix=f"/{name}")
    return f"/{name}"


def ask(address: str, body: dict[str, Any] | None = None, **headers: str) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json", **headers})
    try:
        with _OPENER.open(request, timeout=500) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            content = error.read().decode()
            return error.code, json.loads(content) if content.startswith("{") else content


def test_subjects_come_and_go_over_one_base(service: str, fine_tuned: dict[str, Path]) -> None:
    status, subjects = ask(f"{service}/subjects")
    assert status == 200
    assert [(each["subject"], each["identifier"]) for each in subjects] == [
        ("bag", "rjs"),
        ("mug", "tfz"),
        ("rex", "zqx"),
    ]
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


def test_twenty_requests_at_once_over_three_subjects_give_what_each_gives_alone(
    busy_service: str, fine_tuned: dict[str, Path]
) -> None:
    pipelines = {name: load_pipeline(fine_tuned[name], device="cpu", dtype=torch.float32) for name in IDENTIFIERS}
    bodies = [
        {
            "subject": name,
            "prompt": f"a photo of [V] dog {('on the beach', 'in the snow')[turn % 2]}",
            "num": 1 + turn % 2,
            "seed": 100 * turn,
            "num_inference_steps": (4, 5)[turn % 3 == 0],
        }
        for turn in range(20)
        for name in IDENTIFIERS
    ]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda body: ask(f"{busy_service}/generate", body), bodies))
    assert [answer for status, answer in answers if status != 200] == []
    for body, (_, made) in zip(bodies, answers, strict=True):
        name, num, seed = body["subject"], int(body["num"]), int(body["seed"])
        prompt = body["prompt"].replace("[V]", IDENTIFIERS[name])
        for place, image in enumerate(made["images"]):
            [alone] = sample(
                pipelines[name],
                [prompt],
                [seed + place],
                num_inference_steps=body["num_inference_steps"],
                guidance_scale=4.0,
                height=SIDES[name],
                width=SIDES[name],
            )
            together = Image.open(io.BytesIO(base64.b64decode(image)))
            apart = np.abs(np.asarray(together, np.int16) - np.asarray(alone, np.int16)).max()
            assert apart <= 1, (name, body)
        assert len(made["images"]) == num


def test_a_prompt_that_is_cut_off_is_refused_and_those_beside_it_are_not(busy_service: str) -> None:
    prompts = ["a photo of [V] dog", f"a photo {'on the beach ' * 8}of [V] dog", "a photo of a dog"] * 3
    bodies = [{"subject": "rex", "prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: ask(f"{busy_service}/generate", body), bodies))
    assert [status for status, _ in answers] == [200, 422, 200] * 3
    assert answers[0][1]["warnings"] == []
    assert answers[1][1]["detail"].startswith("the prompt has 31 tokens, and the base model reads 22: 'beach on the")
    assert answers[2][1]["warnings"] == ["the prompt names no [V]; write [V] where the subject is meant"]


def test_a_version_that_is_deleted_while_it_is_served_takes_nobody_along(tracking_uri: str, server: str) -> None:
    address = f"{server}{start(tracking_uri, 'fading', pattern='models:/dreambooth-*@latest')}"
    connect(tracking_uri).delete_model_version("dreambooth-old", "1")
    with ThreadPoolExecutor(6) as pool:
        bodies = [{"subject": name, "prompt": "a [V] dog"} for name in ("old", "rex", "mug")] * 2
        answers = list(pool.map(lambda body: ask(f"{address}/generate", body), bodies))
    assert [status for status, _ in answers] == [503, 200, 200] * 2
    assert answers[0][1]["detail"].startswith("old can't be loaded: ")


def test_it_says_what_is_wrong_with_a_request(service: str) -> None:
    good = {"subject": "rex", "prompt": "a photo of [V] dog"}
    status, answer = ask(f"{service}/generate", good | {"subject": "new"})
    assert (status, answer["detail"]) == (404, "there is no subject 'new' here; there are bag, mug, rex")
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
@pytest.mark.parametrize("width", [390, 1920])
def test_a_prompt_is_typed_and_images_are_seen(service: str, tmp_path: Path, width: int) -> None:
    with open_browser(tmp_path / "profile", width=width) as page:
        page.open(f"{service}/")
        page.until("!document.getElementById('go').disabled")
        assert page.run("return document.getElementById('prompt').value") == "a photo of [V] dog"
        page.click("#go")
        page.until("[...document.querySelectorAll('figure img')].filter(image => image.naturalWidth > 0).length == 4")
        assert "models:/dreambooth-bag/1" in page.run("return document.querySelector('figcaption').textContent")
        assert page.faults() == []
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        page.run("document.getElementById('prompt').value = ' '.repeat(3)")
        page.run("document.getElementById('seed').value = '-1'")
        assert not page.run("return document.getElementById('form').checkValidity()")
        assert page.console() == []


@needs_browser
def test_its_pages_need_no_more_than_the_service(service: str, tmp_path: Path) -> None:
    with open_browser(tmp_path / "profile", width=390) as page:
        for address in (f"{service}/", f"{service}/docs"):
            page.open(address)
            assert page.faults() == []
            assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        assert "num_inference_steps" in page.run("return document.body.textContent")
        origins = "performance.getEntriesByType('resource').map(each => new URL(each.name).origin)"
        assert page.run(f"return {origins}.every(origin => origin === location.origin)")
        page.click("a")
        assert page.run("return location.href") == f"{service}/"
        assert page.console() == []


@needs_browser
def test_steps_guidance_and_a_random_seed_are_sent_and_images_can_be_kept(service: str, tmp_path: Path) -> None:
    with open_browser(tmp_path / "profile") as page:
        page.open(f"{service}/")
        page.until("!document.getElementById('go').disabled")
        page.click("#random")
        seed = page.run("return document.getElementById('seed').valueAsNumber")
        page.run("document.querySelector('details').open = true")
        for field, text in (("steps", "20"), ("guidance", "3.5"), ("num", "1"), ("prompt", "a dog")):
            page.run(f"document.getElementById('{field}').value = ''")
            page.run(f"document.getElementById('{field}').focus()")
            page.press(*text)
        assert page.run("return document.getElementById('hint').checkVisibility()")
        page.run("const ask = fetch; fetch = (path, options) => { sent = options.body; return ask(path, options); }")
        page.click("#go")
        page.until("document.getElementById('waiting').checkVisibility()")
        page.until("document.querySelector('.images img')?.naturalWidth")
        page.until("!document.getElementById('waiting').checkVisibility()")
        asked = json.loads(page.run("return sent"))
        expected = {"subject": "bag", "prompt": "a dog", "num": 1, "num_inference_steps": 20, "guidance_scale": 3.5}
        assert asked == expected | {"seed": seed}
        assert page.run("return document.querySelector('[download]').download") == f"bag-{seed}.png"
        assert page.run("return document.querySelector('[download]').href.startsWith('data:image/png;base64,')")
        page.run("document.getElementById('prompt').focus()")
        page.press(*" [V]")
        assert not page.run("return document.getElementById('hint').checkVisibility()")
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


def test_two_models_that_would_have_one_name_keep_their_own(tracking_uri: str) -> None:
    client = connect(tracking_uri)
    known = client.get_model_version("dreambooth-rex", "1")
    with default_tracking(tracking_uri):  # where the database's registry looks the source up
        for name in ("twin", "dreambooth-twin"):
            client.create_registered_model(name)
            client.create_model_version(name, source=str(known.source), tags=known.tags)
    found = find_subjects("models:/*twin@latest", tracking_uri)
    assert [(one.name, one.address) for one in found] == [
        ("dreambooth-twin", "models:/dreambooth-twin/1"),
        ("twin", "models:/twin/1"),
    ]
    assert [one.resolution for one in found] == [64, 64]
