"""What `dreambooth evaluate` refuses before any work starts."""

import shutil
from pathlib import Path

import pytest

from dreambooth.config.settings import load_config
from dreambooth.errors import InputError
from pipelines.apps.evaluate_model import MeasurableModel, evaluate_model, settings_of
from pipelines.storage.publications import publish, read_manifest


@pytest.fixture
def published(tiny_pipeline: Path, tmp_path: Path) -> str:
    """A published model that says what it was made of, but for a base model of another hash."""
    metadata = {
        "key": "k",
        "subject": "rex",
        "class_noun": "dog",
        "identifier": "tfz",
        "base_model": str(tiny_pipeline),
        "base_hash": "0" * 16,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
    }
    return publish(tiny_pipeline, str(tmp_path / "rex" / "model"), metadata=metadata).uri


def refused(model: str, images: Path, **settings: str | tuple[str, ...]) -> str:
    with pytest.raises(InputError) as caught:
        evaluate_model(model, str(images), **settings)  # type: ignore[arg-type]
    return str(caught.value)


MINIATURE = ("evaluation.bank=miniature",)


def test_a_base_model_that_is_another_now(published: str, instance_folder: Path) -> None:
    message = refused(published, instance_folder, prompts="miniature", overrides=MINIATURE)
    assert message.startswith("the model was made from a base model of hash 0000000000000000, and ")


def test_a_protocol_that_measures_nothing(published: str, instance_folder: Path) -> None:
    assert "measures nothing" in refused(published, instance_folder, overrides=("evaluation.protocol=none",))


def test_prompts_that_are_not_there_or_have_no_placeholder(
    published: str, instance_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    assert "can't read the prompts" in refused(published, instance_folder, prompts=str(path), overrides=MINIATURE)
    path.write_text("a dog\n")
    assert "no placeholder [V]" in refused(published, instance_folder, prompts=str(path), overrides=MINIATURE)


def test_a_folder_that_no_run_made(tiny_pipeline: Path, instance_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_pipeline, tmp_path / "other"))
    assert "doesn't record what it was made from" in refused(str(copy), instance_folder)


def test_a_model_that_is_not_registered(mlflow_database: str, instance_folder: Path) -> None:
    message = refused("models:/rex@latest", instance_folder, tracking_uri=mlflow_database)
    assert "there is no registered model 'rex'" in message


@pytest.mark.parametrize(
    ("params", "buckets"),
    [
        ({}, (False, None)),
        ({"aspect_buckets": "False", "bucket_step": "None", "bucket_max_aspect_ratio": "2.0"}, (False, None)),
        ({"aspect_buckets": "True", "bucket_step": "16", "bucket_max_aspect_ratio": "3.0"}, (True, 16)),
    ],
)
def test_photographs_have_the_sizes_of_the_run(
    published: str, params: dict[str, str], buckets: tuple[bool, int | None]
) -> None:
    """Which may be smaller than the square."""
    of_run = {f"images.{name}": value for name, value in params.items()}
    model = MeasurableModel(manifest=read_manifest(published), registered=None, run=None, params=of_run)
    images = load_config(settings_of(model, "photos")).images
    assert (images.aspect_buckets, images.bucket_step) == buckets


def test_what_is_odd_about_the_photographs_is_said_as_by_run(
    tiny_pipeline: Path, instance_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command line, up to where work would start: two equal pictures, and a damaged one among others."""
    from click.testing import CliRunner

    import pipelines.apps.evaluate_model
    from dreambooth.models.base_model import resolve_base_model
    from pipelines.cli import main

    def start(*arguments: object) -> None:
        raise InputError("work would start")

    monkeypatch.setattr(pipelines.apps.evaluate_model, "ray_cluster", start)
    base = resolve_base_model(str(tiny_pipeline))
    metadata = {"key": "k", "subject": "rex", "class_noun": "dog", "identifier": "tfz", "num_inference_steps": 2}
    metadata |= {"base_model": str(tiny_pipeline), "base_hash": base.hash, "guidance_scale": 2.0, "resolution": 64}
    model = publish(tiny_pipeline, str(tmp_path / "rex" / "model"), metadata=metadata).uri
    photos = Path(shutil.copytree(instance_folder, tmp_path / "photos"))
    shutil.copyfile(photos / "00.png", photos / "05.png")
    others = Path(shutil.copytree(photos, tmp_path / "others"))
    given = ["evaluate", "--model", model, "--instance-images", str(photos), "--set", "evaluation.bank=miniature"]
    given += ["--prompts", "miniature", "--set", f"evaluation.real_images={others}"]

    result = CliRunner().invoke(main, given)
    assert (result.exit_code, "work would start" in result.stderr) == (2, True), result.output
    assert "warning: 00.png and 05.png are the same picture" in result.stderr
    assert "warning: evaluation.real_images: 00.png and 05.png are the same picture" in result.stderr

    (others / "bad.png").write_bytes((photos / "00.png").read_bytes()[:2000])
    result = CliRunner().invoke(main, given)
    assert (result.exit_code, "work would start" in result.stderr) == (2, False)
    assert f"{others}/bad.png is damaged" in result.stderr
