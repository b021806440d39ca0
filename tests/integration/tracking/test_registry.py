"""A registered version: its history, its files, and that MLflow serves it without our code."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from mlflow import MlflowClient, pyfunc
from mlflow.exceptions import MlflowException
from PIL import Image
from registering import SERVE, STEPS, answers, differ, picture_at, register_model
from safetensors.torch import load_file, save_file

from dreambooth.config.settings import TrackingConfig
from dreambooth.errors import InputError
from dreambooth.sampling.sampler import load_pipeline, sample, sampling_dtype
from pipelines.apps.generate import generate
from pipelines.storage import files, publications
from pipelines.tracking.client import connect, default_tracking, quietly
from pipelines.tracking.registry import RegisteredVersion, describe
from pipelines.tracking.runs import check_tracking

CHECKOUT = Path(__file__).parents[3]
PROMPT = "a photo of [V] dog on the beach"
LONG = f"a photo {'on the beach ' * 8}of [V] dog"


@pytest.fixture(scope="module")
def tracking_uri(tracking_in: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return check_tracking(TrackingConfig(uri=tracking_in(tmp_path_factory.mktemp("registry"))))


@pytest.fixture(scope="module")
def client(tracking_uri: str) -> MlflowClient:
    return connect(tracking_uri)


@pytest.fixture(scope="module")
def registered(tracking_uri: str, tiny_pipeline: Path) -> RegisteredVersion:
    return register_model(tracking_uri, tiny_pipeline, result_key="first")


def test_a_version_carries_its_history(registered: RegisteredVersion, client: MlflowClient) -> None:
    assert registered.uri == "models:/dreambooth-rex/1"
    version = client.get_model_version_by_alias("dreambooth-rex", "latest")
    assert int(version.version) == registered.version
    assert version.tags == {
        "base_model": "miniature",
        "git_commit": "abc123",
        "max_train_steps": "200",
        "identifier": "zqx",
        "class_noun": "dog",
        "dreambooth.result_key": "first",
        "stored_as": "full",
    }
    assert client.get_logged_model(registered.model_id).status == "READY"
    assert version.run_id is not None
    outputs = client.get_run(version.run_id).outputs
    assert outputs is not None
    assert [model.model_id for model in outputs.model_outputs] == [registered.model_id]


def test_the_same_result_is_one_version(tracking_uri: str, client: MlflowClient, tiny_pipeline: Path) -> None:
    first = register_model(tracking_uri, tiny_pipeline, name="dreambooth-twice", result_key="a")
    assert register_model(tracking_uri, tiny_pipeline, name="dreambooth-twice", result_key="a") == first
    second = register_model(tracking_uri, tiny_pipeline, name="dreambooth-twice", result_key="b")
    assert (first.version, second.version) == (1, 2)
    assert int(client.get_model_version_by_alias("dreambooth-twice", "latest").version) == 2


def test_a_card_describes_what_nobody_has_described_otherwise(
    tracking_uri: str, client: MlflowClient, tiny_pipeline: Path
) -> None:
    about = {"name": "dreambooth-said", "description": "# rex\n\nfirst"}
    first = register_model(tracking_uri, tiny_pipeline, result_key="a", **about)

    def said() -> tuple[str | None, str | None]:
        version = client.get_model_version(first.name, str(first.version))
        return version.description, client.get_registered_model(first.name).description

    assert said() == ("# rex\n\nfirst",) * 2
    client.update_model_version(first.name, str(first.version), "")  # as if the first attempt had broken off here
    assert register_model(tracking_uri, tiny_pipeline, result_key="a", **about) == first
    assert said() == ("# rex\n\nfirst",) * 2
    client.update_registered_model(first.name, "My own words.")
    describe(client, first.name, first.version, "# rex\n\nsecond")
    assert said() == ("# rex\n\nsecond", "My own words.")


def test_the_weights_are_files_and_nothing_is_a_pickle(
    registered: RegisteredVersion, client: MlflowClient, tiny_pipeline: Path
) -> None:
    root = Path(client.get_logged_model(registered.model_id).artifact_location.removeprefix("file://"))
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    weights = files["artifacts/pipeline/unet/diffusion_pytorch_model.safetensors"]
    assert not weights.is_symlink()
    assert weights.read_bytes() == (tiny_pipeline / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".bin", ".pt"))]
    requirements = files["requirements.txt"].read_text().splitlines()
    pinned = {line.partition("==")[0]: line.partition("==")[2] for line in requirements}
    assert {"torch", "diffusers", "transformers", "safetensors", "pillow", "mlflow"} <= set(pinned)
    assert all(version and "+" not in version for version in pinned.values())
    assert not {"ray", "deepspeed"} & set(pinned)


@pytest.mark.parametrize(
    ("prompt", "served", "generated"),
    [
        (" ", "a prompt is empty", "the prompt is empty"),
        ("a photo of [v] dog", "'[v]' in 'a photo of [v] dog' is no placeholder here", "'[v]' is no placeholder here"),
        ("a photo of {class_noun}", "'{class_noun}' in ", "write the class noun itself"),
        (LONG, "the model reads 24: 'beach on the beach of zqx dog", "the base model reads 22: 'beach on the beach of"),
    ],
)
def test_a_prompt_that_the_served_model_would_read_otherwise(
    registered: RegisteredVersion, tracking_uri: str, working_folder: Path, prompt: str, served: str, generated: str
) -> None:
    with default_tracking(tracking_uri), quietly():
        model = pyfunc.load_model(registered.uri)
        with pytest.raises(MlflowException) as error:
            model.predict(pd.DataFrame({"prompt": ["a photo of [V] dog", prompt]}), {"num_inference_steps": 1})
    assert error.value.get_http_status_code() == 400
    assert served in error.value.message
    with pytest.raises(InputError) as refused:
        generate(registered.uri, prompt, output="pictures", tracking_uri=tracking_uri)
    assert generated in str(refused.value)
    assert not Path("pictures/0.png").exists()


def test_it_loads_where_there_is_no_ray_no_deepspeed_and_no_pickle(
    registered: RegisteredVersion, tracking_uri: str, working_folder: Path, tiny_pipeline: Path
) -> None:
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": tracking_uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PYTHONPATH": str(CHECKOUT),
    }
    command = [sys.executable, "-c", SERVE, PROMPT]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (working_folder / "pictures" / "0.png").is_file()
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["params"] == {
        "seed": 0,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "height": 0,
        "width": 0,
    }
    assert answer["example"] == 1
    served = [Image.open(io.BytesIO(base64.b64decode(image))) for image in answer["images"]]
    pipeline = load_pipeline(tiny_pipeline, device="cpu", dtype=torch.float32)
    prompt = PROMPT.replace("[V]", "zqx")
    expected = sample(pipeline, [prompt] * 2, [7, 8], num_inference_steps=STEPS, guidance_scale=4.0)
    # What MLflow serves has none of our code: it is plain diffusers' to the bit, and ours but for rounding.
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    sampler = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=sampling_dtype("cpu") is torch.bfloat16):
            latents = pipeline([prompt] * 2, generator=generators, **sampler).images
        pixels = pipeline.vae.decode(latents.float() / pipeline.vae.config.scaling_factor).sample
    plain = pipeline.image_processor.postprocess(pixels)
    assert not any(differ(one, other) for one, other in zip(served, plain, strict=True))
    assert not any(differ(one, other, by_more_than=1) for one, other in zip(served, expected, strict=True))
    assert differ(*served, by_more_than=1)


def test_generate_writes_pictures_of_a_registered_model(
    registered: RegisteredVersion, tracking_uri: str, tmp_path: Path, tiny_pipeline: Path
) -> None:
    result = generate(
        "models:/dreambooth-rex@latest", PROMPT, num=2, seed=5, output=str(tmp_path), tracking_uri=tracking_uri
    )
    assert result.paths == (str(tmp_path / "5.png"), str(tmp_path / "6.png"))
    assert picture_at(result.paths[0]).size == (64, 64)
    assert differ(picture_at(result.paths[0]), picture_at(result.paths[1]))
    assert picture_at(result.contact_sheet).width > 2 * 128
    # A directory with the same weights gives the same pictures.
    plain = generate(
        str(tiny_pipeline),
        PROMPT.replace("[V]", "zqx"),
        num=2,
        seed=5,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        output=str(tmp_path / "plain"),
    )
    assert not differ(picture_at(result.paths[1]), picture_at(plain.paths[1]))


def test_an_earlier_version_is_served_by_its_own_code(
    registered: RegisteredVersion, client: MlflowClient, tmp_path: Path
) -> None:
    """It was told nothing of its family, and the copy of the served model that it was registered with needs nothing."""
    root = Path(client.get_logged_model(registered.model_id).artifact_location.removeprefix("file://"))
    earlier = Path(shutil.copytree(root, tmp_path / "earlier"))
    package, code = yaml.safe_load((earlier / "MLmodel").read_text()), earlier / "served_model.py"
    facts = package["flavors"]["python_function"]["config"].pop("served")
    (earlier / "MLmodel").write_text(yaml.safe_dump(package))
    asked = pd.DataFrame({"prompt": [PROMPT]})
    with quietly():
        with pytest.raises(KeyError, match="served"):
            pyfunc.load_model(str(earlier))
        code.write_text(code.read_text().replace('context.model_config["served"]', repr(facts)))
        pictures = [pyfunc.load_model(str(each)).predict(asked, params={"seed": 7}) for each in (earlier, root)]
    assert list(pictures[0]["image"]) == list(pictures[1]["image"])
    with quietly():
        own = pyfunc.load_model(str(earlier)).unwrap_python_model()
    assert (own.identifier, type(own.pipeline).__name__) == ("zqx", "StableDiffusionPipeline")


def test_mlflow_models_serve_answers_with_the_same_pictures(
    registered: RegisteredVersion, tracking_uri: str, tmp_path: Path
) -> None:
    """MLflow's own scoring server, for a single model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", registered.uri]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    # MLflow looks for its server's program on the path, as in an activated environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"MLFLOW_TRACKING_URI": tracking_uri, "PATH": path}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while not answers(f"http://127.0.0.1:{port}/ping"):
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.5)
        asked = {"dataframe_records": [{"prompt": PROMPT}], "params": {"seed": 7, "num_inference_steps": STEPS}}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            data=json.dumps(asked).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            [row] = json.load(answer)["predictions"]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)
    [path] = generate(
        registered.uri, PROMPT, num=1, seed=7, output=str(tmp_path / "generated"), tracking_uri=tracking_uri
    ).paths
    assert not differ(Image.open(io.BytesIO(base64.b64decode(row["image"]))), picture_at(path))


def test_generate_takes_a_publication_from_any_store(tiny_pipeline: Path) -> None:
    metadata = {"identifier": "zqx", "num_inference_steps": STEPS, "guidance_scale": 4.0}
    publications.publish(tiny_pipeline, "memory://rex/model", metadata=metadata)
    result = generate("memory://rex/model", PROMPT, num=1, seed=5, output="memory://rex/pictures")
    assert files.read_bytes(result.paths[0]).startswith(b"\x89PNG")


def test_generate_says_what_is_not_there(
    registered: RegisteredVersion, tracking_uri: str, tmp_path: Path, tiny_pipeline: Path
) -> None:
    for model, message in {
        "models:/dreambooth-rox@latest": "no registered model 'dreambooth-rox'.*did you mean 'dreambooth-rex'",
        "models:/dreambooth-rex@champion": "no alias 'champion'; it has latest",
        "models:/dreambooth-rex/7": "no version 7; it has 1",
        "models:/": "expected models:/NAME@ALIAS",
        str(tmp_path): "no model at",
        "memory://absent": "no model at",
    }.items():
        with pytest.raises(InputError, match=message):
            generate(model, PROMPT, output=str(tmp_path), tracking_uri=tracking_uri)
    with pytest.raises(InputError, match="doesn't say what its identifier is"):
        generate(str(tiny_pipeline), PROMPT, output=str(tmp_path))
    for wrong in ({"num": 0}, {"seed": -1}, {"num_inference_steps": 0}, {"guidance_scale": 0.5}, {"height": 60}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} is .*; expected"):
            generate(str(tiny_pipeline), "a dog", output=str(tmp_path), **wrong)  # type: ignore[arg-type]


def test_a_model_kept_as_its_change_serves_the_same_pictures(
    tracking_uri: str, tiny_pipeline: Path, tmp_path: Path
) -> None:
    from dreambooth.models.base_model import resolve_base_model
    from dreambooth.models.delta import write_delta

    # Not the base itself: one weight has moved.
    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline, model)
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_in.weight"] += 0.5
    save_file(weights, model / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    write_delta(resolve_base_model(str(tiny_pipeline)), model, tmp_path / "delta")
    pictures = []
    for name, directory in (("full", model), ("delta", tmp_path / "delta")):
        register_model(tracking_uri, directory, base=tiny_pipeline, name=f"dreambooth-{name}", result_key=name)
        address = f"models:/dreambooth-{name}@latest"
        result = generate(address, PROMPT, num=1, output=str(tmp_path / name), tracking_uri=tracking_uri)
        pictures.append(picture_at(result.paths[0]))
    assert not differ(*pictures)
