"""The main job as a user runs it: one command on the miniature, then pictures from the registry."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from dreambooth.miniature import subject_dir
from pipelines.apps.study.samples import read_samples
from pipelines.driver.lock import locked
from pipelines.storage.publications import read_manifest
from pipelines.tracking.client import connect, quietly
from pipelines.tracking.model_list import list_models

COMMAND = [str(Path(sys.executable).with_name("dreambooth"))]
SETTINGS = [
    "train.max_train_steps=4",
    "train.validate_every=2",
    "prior.num_class_images=4",
    "prior.num_inference_steps=2",
    "evaluation.images_per_prompt=1",
    "evaluation.num_inference_steps=2",
    "evaluation.every=2",
    "evaluation.score_images=1",
    "train.keep=best",
]


def dreambooth(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    process = subprocess.run(
        [*COMMAND, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | environment,
    )
    assert not check or process.returncode == 0, process.stderr
    return process


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str], list[str]]:
    """The folder of a finished run, what it printed, and its arguments."""
    folder = tmp_path_factory.mktemp("personalize")
    arguments = ["run", "--images", str(subject_dir("coral-car")), "--workers", "2", "--zero-stage", "2"]
    arguments += ["--output", str(folder / "run")]
    for setting in [*SETTINGS, f"storage.root={folder}", f"tracking.uri=sqlite:///{folder}/mlflow.db"]:
        arguments += ["--set", setting]
    return folder, dreambooth(*arguments), arguments


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return summary


def test_a_second_command_in_the_same_folder_is_refused(finished: Any, tmp_path: Path) -> None:
    arguments = [*finished[2], "--output", str(tmp_path / "another"), "--set", "train.max_train_steps=3"]
    with locked(str(tmp_path / "another"), say=print):
        process = dreambooth(*arguments, check=False)
    assert process.returncode == 2
    assert f"another command is at work in {tmp_path / 'another'}: process {os.getpid()} on " in process.stderr
    assert list((tmp_path / "another").iterdir()) == []


def test_a_run_leaves_pictures_a_model_and_a_summary(finished: Any) -> None:
    folder, printed, _ = finished
    summary = summary_of(folder)
    assert summary["registered_model"] == "dreambooth-coral-car"
    assert summary["version"] == 1
    assert summary["class_images"] == 4
    assert set(summary["similarity"]) == {"identifier", "class_before", "class_after", "instance"}
    assert len(summary["peak_memory_bytes"]) == 2
    assert [score["step"] for score in summary["scores"]] == [2, 4]
    best = max(summary["scores"], key=lambda score: score["score"])
    assert read_manifest(summary["model_uri"]).metadata["step"] == summary["exported_step"] == best["step"]
    assert set(summary["wall_seconds"]) == {"check", "ray", "class_images", "train", "evaluate", "register", "total"}
    assert summary["startup_seconds"]["total"] > summary["startup_seconds"]["loading"] > 0
    for picture in ("contact_sheet", "loss_curve"):
        assert min(size_of(Path(summary[picture]))) > 300
    assert 'class="pair"' in Path(summary["report"]).read_text()
    assert len(read_samples(summary["report"].removesuffix("/report.html"))["coral-car"].samples) > 0
    for expected in ("report.html", "contact_sheet.png", "dreambooth generate --model", "mlflow ui", "summary.json"):
        assert expected in printed.stdout
    said = [
        line.partition("warning  ")[2] for line in printed.stdout.splitlines() if line.lstrip().startswith("warning  ")
    ]
    assert said == summary["verdict"]["warnings"]  # four steps bind nothing
    others = "".join(line for line in printed.stdout.splitlines() if not line.lstrip().startswith("warning  "))
    for noise in ("Warning", "warning", "Traceback", "torchvision"):
        assert noise not in printed.stderr + others
    manifest = read_manifest(summary["model_uri"])
    assert not [name for name in manifest.files if name.endswith((".pt", ".bin", ".pkl", ".ckpt"))]


def test_its_model_card_says_how_it_was_made_and_where_nothing_lies(finished: Any) -> None:
    folder, _, _ = finished
    summary = summary_of(folder)
    path = Path(summary["card"])
    assert path.parent.parent == folder / "run" / "card" / summary["key"]
    card = ModelCard.load(path)
    assert card.data.to_dict()["license"] == "apache-2.0"
    shown = re.findall(r"!\[[^\]]*\]\((\S+)\)", card.text)
    assert len(shown) == len(set(shown)) == 4
    assert [size_of(path.parent / name) for name in shown] == [(64, 64)] * 4
    for said in (summary["identifier"], summary["key"], "commit ", "DeepSpeed ZeRO-2", "2 x ", "steps/s", "similarity"):
        assert said in card.text
    for file in read_manifest(str(path.parent)).files:
        assert str(folder).encode() not in (path.parent / file).read_bytes()
    with quietly():
        client = connect(f"sqlite:///{folder}/mlflow.db")
        described = client.get_model_version("dreambooth-coral-car", "1").description
        assert described.startswith("# coral-car\n")
        assert re.search(r"\| steps \| 4 of \d+ instance images? each; published is step [24] \|", described)
        assert client.get_registered_model("dreambooth-coral-car").description == described


def test_mlflow_has_curves_pictures_and_a_tagged_version(finished: Any) -> None:
    folder, _, _ = finished
    summary = summary_of(folder)
    with quietly():
        client = connect(f"sqlite:///{folder}/mlflow.db")
        run = client.get_run(summary["mlflow"]["run_id"])
        assert run.info.status == "FINISHED"
        photographs, class_images = sorted(run.inputs.dataset_inputs, key=lambda one: one.dataset.name, reverse=True)
        assert (photographs.dataset.name, photographs.dataset.digest) == ("coral-car", run.data.tags["data_hash"])
        assert json.loads(photographs.dataset.source)["uri"] == str(subject_dir("coral-car"))
        assert class_images.dataset.digest == run.data.tags["prior_set"]
        for metric in ("loss", "instance_loss", "prior_loss", "learning_rate", "grad_norm", "images_per_second"):
            curve = client.get_metric_history(run.info.run_id, f"train/{metric}")
            assert [point.step for point in curve] == [1, 2, 3, 4]
        assert run.data.metrics["similarity/identifier"] == summary["similarity"]["identifier"]
        assert run.data.metrics["samples/near_copies"] == summary["verdict"]["near_copies"]
        assert run.data.tags["warnings"] == (" | ".join(summary["verdict"]["warnings"]) or "none")
        images = {artifact.path for artifact in client.list_artifacts(run.info.run_id, "images")}
        for key in ("contact_sheet", "loss_curve", "validation"):
            assert any(key in image for image in images)
        version = client.get_model_version("dreambooth-coral-car", "1")
        for tag in ("warnings", "verdict", "similarity"):
            assert version.tags[tag] == run.data.tags[tag]
        assert version.tags["similarity"] == f"{summary['similarity']['identifier']:.3f}"
        assert version.tags["stored_as"] == "reference"
        assert version.tags["identifier"] == summary["identifier"]
        assert version.tags["class_noun"] == "car"
        assert version.tags["base_model"] == "miniature"
        assert version.tags["configuration_hash"] == summary["key"]
        assert {"base_hash", "data_hash", "prior_set", "git_commit"} <= set(version.tags)
        where = "tags.subject = 'coral-car' AND tags.class_noun = 'car' AND tags.base_model = 'miniature'"
        [logged] = client.search_logged_models([run.info.experiment_id], where)
        assert logged.model_id == str(version.source).rpartition("/")[2]
    [listed] = list_models(f"sqlite:///{folder}/mlflow.db", "similarity/identifier > -1 and base_model = miniature")
    assert listed.name == "dreambooth-coral-car"
    assert not list_models(f"sqlite:///{folder}/mlflow.db", "samples/near_copies > 1")


def test_the_same_command_again_does_nothing(finished: Any) -> None:
    folder, _, arguments = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
    again = dreambooth(*arguments)
    assert {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")} == before
    assert "version 1" in again.stdout


def test_the_next_plan_knows_the_pace(finished: Any) -> None:
    _, _, arguments = finished
    planned = dreambooth(*arguments, "--set", "train.max_train_steps=400", "--dry-run").stderr
    assert re.search(r"(?m)^time +about .+ of steps, at the [\d.]+ steps/s of coral-car on 20", planned), planned


def test_generate_needs_neither_ray_nor_deepspeed(finished: Any, tmp_path: Path) -> None:
    folder, _, _ = finished
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("ray", "deepspeed"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')\n")
    arguments = ["generate", "--model", "models:/dreambooth-coral-car@latest", "a [V] car on the beach"]
    arguments += ["--num", "2", "--seed", "1", "--steps", "2", "--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    first = dreambooth(*arguments, "--output", str(tmp_path / "a"), PYTHONPATH=str(blocked))
    dreambooth(*arguments, "--output", str(tmp_path / "b"), PYTHONPATH=str(blocked))
    for name in ("1.png", "2.png"):
        assert size_of(tmp_path / "a" / name) == (64, 64)
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "contact_sheet.png").is_file()
    assert str(tmp_path / "a" / "1.png") in first.stdout


def test_a_loss_that_is_no_number_is_a_clear_failure(tmp_path: Path) -> None:
    arguments = ["run", "--images", str(subject_dir("coral-car")), "--output", str(tmp_path / "run"), "--quiet"]
    for setting in ("train.learning_rate=1", "train.max_grad_norm=1e9", "train.max_train_steps=60"):
        arguments += ["--set", setting]
    for setting in ("prior.prior_loss_weight=0", f"tracking.uri=sqlite:///{tmp_path}/m.db"):
        arguments += ["--set", setting]
    failed = dreambooth(*arguments, check=False)
    assert failed.returncode == 1
    assert "the loss is" in failed.stderr
    assert "lower train.learning_rate (it is 1.0)" in failed.stderr


def test_another_form_is_a_further_version_of_the_same_weights(finished: Any) -> None:
    """The last test of this run: it changes the summary."""
    folder, _, arguments = finished
    model = summary_of(folder)["model_uri"]
    again = dreambooth(*arguments, "--set", "registry.storage=full")
    assert "version 2" in again.stdout
    assert summary_of(folder)["model_uri"] == model
    with quietly():
        client = connect(f"sqlite:///{folder}/mlflow.db")
        forms = [client.get_model_version("dreambooth-coral-car", number).tags["stored_as"] for number in "12"]
    assert forms == ["reference", "full"]
