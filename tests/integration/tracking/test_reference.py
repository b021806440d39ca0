"""A registered version refers to the publication of its model: nothing is uploaded twice, and plain MLflow loads it."""

import datetime
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow_server import MlflowServer
from PIL import Image, ImageChops
from plain_mlflow import begin_loading, drawn, refused
from served import facts_of

from dreambooth.config.settings import TrackingConfig
from dreambooth.errors import InputError
from pipelines.apps.garbage import find_leftovers, remove_leftovers
from pipelines.apps.generate import generate
from pipelines.cli import main
from pipelines.storage.files import exists, is_local, join, read_bytes, remove, upload
from pipelines.storage.publications import MANIFEST_NAME, Manifest, manifest_sha256, opened, publish
from pipelines.tracking.client import connect
from pipelines.tracking.registry import RegisteredVersion, find_version, register
from pipelines.tracking.runs import track

PROMPT = "a photo of [V] dog on the beach"
UNET = "unet/diffusion_pytorch_model.safetensors"
MOST_BYTES = 200_000
"""Bytes of a version in MLflow: nothing in it grows with the model."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """It hands artifacts through (`mlflow-artifacts:`), as a team's server does."""
    made = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "publications"


def published(directory: Path, parent: str) -> Manifest:
    metadata = {"identifier": "zqx", "num_inference_steps": 2, "guidance_scale": 4.0}
    return publish(directory, join(parent, "model"), metadata=metadata)


def registered(uri: str, model: Manifest | Path, *, key: str = "first", name: str) -> RegisteredVersion:
    with opened(model) if isinstance(model, Manifest) else nullcontext(model) as directory:
        served = facts_of(directory)
    with track(TrackingConfig(uri=uri), run_name="rex") as run:
        return register(
            run_id=run.run_id,
            tracking_uri=uri,
            model=model,
            name=name,
            tags={"base_model": "miniature"},
            identifier="zqx",
            class_noun="dog",
            result_key=key,
            served=served,
            num_inference_steps=2,
            guidance_scale=4.0,
        )


def generated(model: str, uri: str, folder: Path) -> Image.Image:
    [path] = generate(model, PROMPT, num=1, seed=7, output=str(folder), tracking_uri=uri).paths
    return Image.open(path).convert("RGB")


def same(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getbbox() is None


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("place", ["relative", "s3"])
def test_plain_mlflow_draws_what_generate_draws_from_weights_that_lie_once(
    place: str, server: MlflowServer, tiny_pipeline: Path, cache: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    parent = "output" if place == "relative" else request.getfixturevalue("s3")
    name = f"dreambooth-{place}"
    before = size(server.folder / "artifacts")
    manifest = published(tiny_pipeline, parent)
    version = registered(server.uri, manifest, name=name)
    connect(server.uri).set_registered_model_alias(name, "champion", str(version.version))

    assert size(tiny_pipeline) > 2 * MOST_BYTES
    assert 0 < size(server.folder / "artifacts") - before < MOST_BYTES
    processes = [
        begin_loading(address, PROMPT, tracking_uri=server.uri, folder=tmp_path / f"process-{number}")
        for number, address in enumerate((f"models:/{name}@champion", version.uri))
    ]
    pictures = [drawn(process) for process in processes]
    assert same(*pictures)
    assert same(pictures[0], generated(f"models:/{name}@champion", server.uri, tmp_path / "registered"))
    assert same(pictures[0], generated(manifest.uri, server.uri, tmp_path / "published"))
    copies = [path.name for path in cache.iterdir() if path.is_dir()] if cache.exists() else []
    assert copies == ([] if is_local(manifest.uri) else [manifest_sha256(manifest.uri)])
    to = tmp_path / "exported"
    arguments = ["export", f"models:/{name}@champion", "--tracking-uri", server.uri, "--quiet"]
    exported = CliRunner().invoke(main, [*arguments, "--format", "diffusers", "--to", str(to)])
    assert exported.exit_code == 0, exported.output
    assert {line.split()[0] for line in exported.stdout.splitlines()} >= {
        record.sha256 for file, record in manifest.files.items() if file.endswith((".safetensors", "model_index.json"))
    }


def test_a_part_is_never_taken_for_a_whole(
    s3: str, server: MlflowServer, tiny_pipeline: Path, cache: Path, tmp_path: Path
) -> None:
    manifest = published(tiny_pipeline, s3)
    version = registered(server.uri, manifest, name="dreambooth-part")
    part = cache / f"{manifest_sha256(manifest.uri)}.part"
    (part / "unet").mkdir(parents=True)
    weights = (tiny_pipeline / UNET).read_bytes()
    (part / "unet" / ".diffusion_pytorch_model.safetensors.0123abcd.part").write_bytes(weights[:1000])
    whole = generated(version.uri, server.uri, tmp_path / "whole")

    copy = cache / manifest_sha256(manifest.uri)
    (copy / UNET).write_bytes(weights[:1000])  # cut by a disk that was full, or by hand
    assert same(generated(version.uri, server.uri, tmp_path / "again"), whole)
    assert (copy / UNET).read_bytes() == weights
    assert not part.exists()


def test_another_publication_is_not_taken_for_the_one_that_was_registered(
    server: MlflowServer, tiny_pipeline: Path, cache: Path, tmp_path: Path
) -> None:
    manifest = published(tiny_pipeline, "output")
    version = registered(server.uri, manifest, name="dreambooth-other")
    weights = Path(manifest.uri, UNET)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(
        InputError, match=f"{manifest.uri}.*{UNET} has sha256 .*, expected {manifest.files[UNET].sha256}"
    ):
        generate(version.uri, PROMPT, output=str(tmp_path), tracking_uri=server.uri)
    Path(manifest.uri, MANIFEST_NAME).write_text("{}")
    with pytest.raises(InputError, match="it is another publication"):
        generate(version.uri, PROMPT, output=str(tmp_path), tracking_uri=server.uri)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_publication_that_is_gone_is_named_with_what_to_do_and_loads_where_it_went(
    place: str, server: MlflowServer, tiny_pipeline: Path, cache: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    parent = str(tmp_path / "output") if place == "local" else request.getfixturevalue("s3")
    manifest = published(tiny_pipeline, parent)
    digest = manifest_sha256(manifest.uri)
    version = registered(server.uri, manifest, name=f"dreambooth-gone-{place}")
    moved = join(parent, "elsewhere")
    for name in (*manifest.files, MANIFEST_NAME):
        source = tmp_path / "manifest.json" if name == MANIFEST_NAME else tiny_pipeline / name
        if name == MANIFEST_NAME:
            source.write_bytes(read_bytes(join(manifest.uri, MANIFEST_NAME)))
        upload(source, join(moved, name))
    remove(manifest.uri)

    with pytest.raises(InputError) as error:
        generate(version.uri, PROMPT, output="pictures", tracking_uri=server.uri)
    plainly = refused(begin_loading(version.uri, PROMPT, tracking_uri=server.uri, folder=tmp_path / "plain"))
    for said in (plainly, str(error.value)):
        for part in (manifest.uri, f"expected a manifest.json of sha256 {digest}", "registry.storage=full"):
            assert part in said
        assert ("a path of the machine it was made on" in said) == (place == "local")
    config = {"publication": moved}
    process = begin_loading(version.uri, PROMPT, tracking_uri=server.uri, folder=tmp_path / "plain", config=config)
    assert same(drawn(process), generated(moved, server.uri, tmp_path / "moved"))


def test_a_store_out_of_reach_is_not_called_a_missing_publication(
    s3: str, server: MlflowServer, tiny_pipeline: Path, cache: Path, tmp_path: Path
) -> None:
    version = registered(server.uri, published(tiny_pipeline, s3), name="dreambooth-away")
    variables = {"AWS_SECRET_ACCESS_KEY": "wrong"}
    said = refused(
        begin_loading(version.uri, PROMPT, tracking_uri=server.uri, folder=tmp_path / "plain", variables=variables)
    )
    assert "can't fetch the publication s3://" in said
    assert "AWS_ENDPOINT_URL" in said
    assert "isn't there" not in said


def test_the_version_and_the_publication_are_deleted_in_either_order(
    server: MlflowServer, tiny_pipeline: Path, tmp_path: Path
) -> None:
    client: MlflowClient = connect(server.uri)
    for number, first in enumerate(("version", "publication")):
        manifest = published(tiny_pipeline, str(tmp_path / first))
        version = registered(server.uri, manifest, name="dreambooth-deleted", key=first)
        assert version.version == number + 1
        if first == "publication":
            remove(manifest.uri)
        client.delete_model_version(version.name, str(version.version))
        client.delete_logged_model(version.model_id)
        assert exists(join(manifest.uri, MANIFEST_NAME)) == (first == "version")
        remove(manifest.uri)
        with pytest.raises(MlflowException, match="not found"):
            client.get_model_version(version.name, str(version.version))


def test_gc_leaves_what_a_version_refers_to(server: MlflowServer, tiny_pipeline: Path, tmp_path: Path) -> None:
    root = tmp_path / "output"
    manifest = published(tiny_pipeline, str(root))
    version = registered(server.uri, manifest, name="dreambooth-kept")
    shutil.copytree(tiny_pipeline / "unet", root / "model" / "20200101T000000000000Z-0123abcd" / "unet")
    leftovers = find_leftovers(str(root), older_than=datetime.timedelta(0))
    assert [Path(leftover.uri).name for leftover in leftovers] == ["20200101T000000000000Z-0123abcd"]
    remove_leftovers(leftovers)
    generated(version.uri, server.uri, tmp_path / "picture")


def test_a_result_is_one_version_until_it_is_published_anew_or_asked_for_as_a_copy(
    server: MlflowServer, tiny_pipeline: Path, tmp_path: Path
) -> None:
    name = "dreambooth-forms"
    first, second = (published(tiny_pipeline, str(tmp_path / place)) for place in ("one", "two"))
    numbers = [
        registered(server.uri, model, name=name).version
        for model in (first, first, second, tiny_pipeline, second, first)
    ]
    # A copy stands for any publication of the result; none is registered after it.
    assert numbers == [1, 1, 2, 3, 3, 3]
    forms = connect(server.uri).search_model_versions(f"name = '{name}'")
    assert sorted((int(each.version), each.tags["stored_as"]) for each in forms) == [
        (1, "reference"),
        (2, "reference"),
        (3, "full"),
    ]

    def known(form: str, published: str, key: str = "first") -> int | None:
        version = find_version(server.uri, name, key, form=form, published=published)
        return None if version is None else version.version

    assert known("full", first.uri) == 3
    assert known("delta", first.uri) is None
    assert known("reference", "anywhere", "second") is None
