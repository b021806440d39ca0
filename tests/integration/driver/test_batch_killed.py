"""A batch whose worker, queue or driver is killed: it goes on, and nobody else pays."""

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from batches import FOUR_CPUS, Silent, history, states, weights
from stopping import stop_when

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.miniature import subject_dir
from pipelines.driver.batch import run_batch
from pipelines.plan.batch_plan import BatchPlan, make_batch_plan
from pipelines.storage.files import read_json
from pipelines.tasks import Progress
from pipelines.tracking.client import connect, quietly


def actors(title: str) -> list[psutil.Process]:
    """Processes of this process's own Ray whose title this expression finds."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if re.search(title, " ".join(process.cmdline())):
                found.append(process)
    assert found, title
    return found


@pytest.mark.recovery
@pytest.mark.usefixtures("ray_session")
def test_a_killed_worker_a_killed_queue_and_a_poisoned_subject_cost_nobody_else(
    make_batch: Callable[..., BatchPlan], tmp_path: Path
) -> None:
    names = ("mint-dog", "navy-dog", "lime-car")
    settings = {"train__max_train_steps": 40, "train__checkpoint_every": 10, "cluster__lanes": 2}
    settings |= {"train__gradient_accumulation_steps": 8}  # so slow that a step is seen before the next ones are done
    calm = make_batch(tmp_path / "calm", *names, poisoned="mint-dog", **settings)
    outcome = run_batch(calm, Silent(), None)
    assert states(outcome) == {name: "failed" if name == "mint-dog" else "done" for name in names}
    assert outcome.failed == 1
    assert "loss is" in outcome.summary["failures"]["mint-dog"]
    [failed] = [row for row in outcome.summary["results"] if row["subject"] == "mint-dog"]
    assert failed["attempts"] == 1  # the same numbers would come to the same

    killed: list[str] = []

    def kill(running: Mapping[str, Progress]) -> None:
        step = running["navy-dog"].step if "navy-dog" in running else 0
        if step >= 20 and not killed:
            killed.append("worker")
            actors("RayTrainWorker")[-1].kill()  # as the kernel does when memory is short
        elif step >= 20 and killed == ["worker"]:
            killed.append("queue")
            for queue in actors(r"ray::\S*Queue"):
                queue.kill()

    struck = make_batch(tmp_path / "struck", *names[1:], **settings)
    assert [subject.key for subject in struck.subjects] == [subject.key for subject in calm.subjects[1:]]
    after = run_batch(struck, Silent(kill), None)
    assert killed == ["worker", "queue"]
    assert set(states(after).values()) == {"done"}
    assert weights(struck) == weights(make_batch_plan("batch", calm.subjects[1:], FOUR_CPUS))
    assert [step for step, _ in history(struck, "navy-dog")] == list(range(1, 41))
    assert sum(row["attempts"] for row in after.summary["results"]) == 3  # only the killed worker's subject again


@pytest.mark.recovery
@pytest.mark.usefixtures("ray_session")
def test_sigterm_while_pictures_are_made_or_a_model_is_published_is_no_failure_and_loses_no_training(
    make_batch: Callable[..., BatchPlan], tmp_path: Path
) -> None:
    """Always to the last rank, which has to tell the first; a model is published while it is evaluated."""
    settings = {"cluster__lanes": 1, "cluster__num_workers": 2, "engine": "torch", "train__checkpoint_every": 100}
    settings |= {"evaluation__enabled": "true", "evaluation__images_per_prompt": 8, "train__max_train_steps": 15}
    settings |= {"evaluation__num_inference_steps": 50, "prior__num_inference_steps": 30}
    settings |= {"prior__num_class_images": 48, "cluster__subject_retries": 0}
    plan = make_batch(tmp_path, "coral-car", **settings)
    told: list[str] = []

    def watch(running: Mapping[str, Progress]) -> None:
        if not told and view.class_images is not None and view.class_images[0]:
            tell("class images")
        elif told == ["class images"] and any(one.pictures is not None for one in running.values()):
            tell("evaluation")

    def tell(at: str) -> None:
        told.append(at)
        actors("RayTrainWorker")[-1].terminate()

    view = Silent(watch)
    outcome = run_batch(plan, view, None)
    assert told == ["class images", "evaluation"]
    [row] = outcome.summary["results"]
    assert (row["state"], row["attempts"], row["failures"]) == ("done", 2, 0)
    kinds = [message["phase"] for _, message in view.messages if message["kind"] == "phase"]
    assert kinds == ["loading", "training", "evaluating", "loading", "evaluating"]  # trained once


@pytest.mark.slow
def test_an_interrupted_and_a_killed_driver_go_on_with_the_same_command(make_config: Any, tmp_path: Path) -> None:
    config: DreamBoothConfig = make_config()
    names = ("coral-car", "navy-dog")
    common = {
        "base_model": config.base_model,
        "prior": config.prior.model_dump(),
        "train": config.train.model_dump()
        | {"max_train_steps": 40, "checkpoint_every": 5, "gradient_accumulation_steps": 8},
        "storage": {"root": str(tmp_path / "out")},
        "evaluation": {"enabled": False},
    }
    subjects = [
        {"name": name, "class_noun": name.rsplit("-", 1)[-1], "instance_images": str(subject_dir(name))}
        for name in names
    ]
    table = tmp_path / "subjects.yaml"
    table.write_text(yaml.safe_dump(common | {"subjects": subjects}))
    command = [sys.executable, "-m", "pipelines.cli", "batch", str(table), "--set", "cluster.lanes=1"]

    interrupted = stop_when(lambda: checkpoints(tmp_path), signal.SIGINT, command, tmp_path)
    assert interrupted.returncode == 130
    assert "run the same command again to resume" in interrupted.stderr
    assert checkpoints(tmp_path)
    assert not models(tmp_path)
    killed = stop_when(lambda: models(tmp_path), signal.SIGKILL, command, tmp_path)
    assert killed.returncode == -signal.SIGKILL

    finished = subprocess.run(command, cwd=tmp_path, check=True, timeout=400, capture_output=True, text=True)
    assert "2 done" in finished.stdout
    [summary] = (tmp_path / "out" / "batches").glob("*/summary.json")
    assert read_json(str(summary))["subjects"]["done"] == 2
    assert len(models(tmp_path)) == 2
    with quietly():
        client = connect(f"sqlite:///{tmp_path}/mlflow.db")
        assert {int(version.version) for version in client.search_model_versions()} == {1}


def checkpoints(folder: Path) -> list[Path]:
    return list((folder / "out").glob("*/checkpoints/*/*/manifest.json"))


def models(folder: Path) -> list[Path]:
    return list((folder / "out").glob("*/model/*/manifest.json"))
