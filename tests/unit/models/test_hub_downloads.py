"""Base models from the hub, by a server that answers as it does: what is downloaded, and what not everyone is given."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hub_server import Handler, served
from replicas import built

from dreambooth.errors import InputError
from dreambooth.models.base_model import pipeline_files, resolve_base_model
from dreambooth.models.licence import Licence, licence_of
from dreambooth.models.single_file import write_single_file

NAME, COMMIT = "black-forest-labs/FLUX.1-dev", "a" * 40
WITH_ACCESS, WITHOUT_ACCESS = "hf_accepted", "hf_not_accepted"


@dataclass
class Hub:
    """A hub with one repository. What it says of a gated one, everyone may read, but its files only with access."""

    files: dict[str, bytes] = field(default_factory=dict)
    gated: bool = True
    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)

    def answer(self, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content, as huggingface.co sends them."""
        self.asked.append((path, token))
        if token and token not in (WITH_ACCESS, WITHOUT_ACCESS):
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        if NAME not in path:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return (404, headers, b"") if token else (401, {"X-Error-Message": "Invalid username or password."}, b"")
        if path.startswith(f"/api/models/{NAME}/tree/"):
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
                for name, content in self.files.items()
            ]
            return 200, {}, json.dumps(listed).encode()
        if path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.files]
            return 200, {}, json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()
        if self.gated and token != WITH_ACCESS:
            restricted = f"Access to model {NAME} is restricted."
            return 403 if token else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": restricted}, b""
        content = self.files[path.partition(f"/resolve/{COMMIT}/")[2]]
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(content)}"'}, content


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    made = Hub(files={"model_index.json": json.dumps({"_class_name": "SanaPipeline"}).encode()})

    class Answers(Handler):
        def do_GET(self) -> None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            self.send(*made.answer(self.path, token))

        do_HEAD = do_GET

    places = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_TOKEN_PATH": str(tmp_path / "token")}
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with served(Answers, monkeypatch, **places) as made.url:
        yield made


@pytest.mark.parametrize(
    ("name", "token", "told"),
    [
        (NAME, None, r"is gated \(401\): accept the licence at {url}/{name}, and set HF_TOKEN to a token of that acc"),
        (
            NAME,
            WITHOUT_ACCESS,
            r"the account of the token hasn't got access \(403\): accept .* {url}/{name} with",
        ),
        (NAME, "hf_expired", r"is refused by the hub to the token that was sent \(401\): set HF_TOKEN to a token"),
        ("nobody/nothing", None, r"is not on the hub, or private or gated \(401\): check the name; .* {url}/{name}"),
        ("nobody/nothing", WITH_ACCESS, "neither a folder here nor available from the hub .*404 Client Error"),
    ],
)
def test_it_is_told_what_to_do(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str, token: str | None, told: str
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=f"^base_model '{name}' .*{told.format(url=hub.url, name=name)}"):
        resolve_base_model(name, weights=False)
    assert {sent for path, sent in hub.asked if name in path} == {token or ""}


def test_with_access_it_is_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WITH_ACCESS)
    with pytest.raises(InputError, match="holds a SanaPipeline, which is not supported"):
        resolve_base_model(NAME, weights=False)


NOT_READ = (
    "flux1-dev.safetensors",
    "whole.ckpt",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "transformer/diffusion_flax_model.msgpack",
    "text_encoder/model.onnx",
    "text_encoder/model.onnx_data",
    "text_encoder/openvino_model.bin",
    "text_encoder/model.fp16.safetensors",
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "safety_checker/model.safetensors",
    "image_encoder/model.safetensors",
    "feature_extractor/preprocessor_config.json",
)
"""What lies beside a family's files in repositories on the hub."""


@pytest.mark.parametrize(
    "replica", ["stable-diffusion-xl", "stable-diffusion-3.5", "flux-dev", "pixart-sigma", "deepfloyd-if"]
)
@pytest.mark.parametrize("weights", [True, False], ids=["to train", "to plan"])
def test_a_family_downloads_its_own_files_alone(hub: Hub, tmp_path: Path, replica: str, weights: bool) -> None:
    folder = built(replica, tmp_path / "repository")
    needed = {str(path.relative_to(folder)): path.read_bytes() for path in pipeline_files(folder)}
    needed["README.md"] = b"---\nlicense: other\nlicense_name: flux\nlicense_link: LICENSE.md\n---\nWords"
    hub.files, hub.gated = dict.fromkeys(NOT_READ, b"not to be read") | needed, False
    found = resolve_base_model(NAME, weights=weights)
    downloaded = {str(path.relative_to(found.directory)) for path in found.directory.rglob("*") if path.is_file()}
    wanted = {name for name in needed if weights or not name.endswith(".safetensors")}
    assert downloaded == wanted
    assert found.has_weights is weights
    text = f"https://huggingface.co/{NAME}/blob/main/LICENSE.md"
    assert licence_of(NAME, found.directory) == Licence(id="other", name="flux", link=text)
    if weights:
        assert found.hash == resolve_base_model(str(folder)).hash


def files_of(replica: str, folder: Path) -> dict[str, bytes]:
    built(replica, folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in pipeline_files(folder)}


@pytest.mark.parametrize("weights", [True, False], ids=["to train", "to plan"])
@pytest.mark.parametrize("pickled", ["unet", "text_encoder"])
def test_weights_that_are_pickles_alone_are_refused_before_anything_is_downloaded(
    hub: Hub, tmp_path: Path, pickled: str, weights: bool
) -> None:
    files, hub.gated = files_of("stable-diffusion-1.5", tmp_path / "repository"), False
    [whole] = [name for name in files if name.startswith(f"{pickled}/") and name.endswith(".safetensors")]
    bare = whole.removesuffix(".safetensors")
    hub.files = {f"{bare}.bin" if name == whole else name: content for name, content in files.items()}
    told = rf"^base_model '{NAME}': the hub has no {whole}\. There is {bare}\.bin, which isn't read, .* safetensors: "
    with pytest.raises(InputError, match=told):
        resolve_base_model(NAME, weights=weights)
    assert {path.rpartition("/")[2] for path, _ in hub.asked if "/resolve/" in path} == {"model_index.json"}


def test_one_file_takes_its_configurations_from_a_repository_of_pickles(hub: Hub, tmp_path: Path) -> None:
    files, hub.gated = files_of("stable-diffusion-1.5", tmp_path / "repository"), False
    hub.files = {name.replace(".safetensors", ".bin"): content for name, content in files.items()}
    write_single_file(tmp_path / "repository", tmp_path / "model.safetensors", metadata={})
    found = resolve_base_model(f"{tmp_path}/model.safetensors#{NAME}")
    assert found.parameter_counts == resolve_base_model(str(tmp_path / "repository")).parameter_counts
    assert not [path for path, _ in hub.asked if path.endswith(".bin")]


def test_a_half_precision_variant_alone_is_downloaded_and_read(hub: Hub, tmp_path: Path) -> None:
    whole, hub.gated = files_of("stable-diffusion-xl", tmp_path / "repository"), False
    halves = {name.replace(".safetensors", ".fp16.safetensors"): content for name, content in whole.items()}
    others = {name.replace(".fp16.", ".bf16."): b"not to be read" for name in halves if ".fp16." in name}
    hub.files = halves | others
    found = resolve_base_model(NAME)
    assert found.has_weights
    assert {str(path.relative_to(found.directory)) for path in pipeline_files(found.directory)} == set(halves)
    downloaded = {str(path.relative_to(found.directory)) for path in found.directory.rglob("*") if path.is_file()}
    assert downloaded == set(halves)
    assert found.parameter_counts == resolve_base_model(str(tmp_path / "repository")).parameter_counts
