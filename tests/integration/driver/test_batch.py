"""Many subjects through warm lanes on a real Ray: what comes out, whoever was killed on the way."""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from stopping import stop_when

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.miniature import subject_dir, subject_names
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.batch import BatchOutcome, run_batch
from pipelines.driver.conclude import conclude
from pipelines.driver.personalize import personalize
from pipelines.plan.batch_plan import BatchPlan, make_batch_plan
from pipelines.plan.run_plan import Plan, make_plan
from pipelines.stages.embeddings import embeddings_uri, read_embeddings
from pipelines.storage.files import join, read_json
from pipelines.storage.publications import published
from pipelines.tasks import Message, Progress, State
from pipelines.tracking.client import connect, quietly
from pipelines.tracking.line import Away

FOUR_CPUS = Resources(cpus=4, gpus=0)


class Silent:
    """Shows nothing; calls `watch` with the subjects in lanes."""

    def __init__(self, watch: Callable[[Mapping[str, Progress]], None] = lambda running: None) -> None:
        self.watch = watch
        self.lines: list[str] = []
        self.messages: list[tuple[str, Message]] = []

    def update(
        self,
        counts: Mapping[State, int],
        running: Mapping[str, Progress],
        *,
        class_images: tuple[int, int] | None,
        failures: Sequence[tuple[str, str]],
    ) -> None:
        self.watch(running)

    def line(self, text: str) -> None:
        self.lines.append(text)

    def message(self, name: str, message: Message) -> None:
        self.messages.append((name, message))


@pytest.fixture
def make_batch(make_config: Any, class_images: Path) -> Callable[..., BatchPlan]:
    """A plan of several subjects of the miniature, on a tiny base, in a folder."""

    def make(folder: Path, *subjects: str, poisoned: str | None = None, **settings: Any) -> BatchPlan:
        configs = [
            make_config(
                **{
                    "subject__name": name,
                    "subject__class_noun": name.rsplit("-", 1)[-1],
                    # By name, so that a subject has the same one in whatever batch it is.
                    "subject__identifier": f"{name[0]}fz",
                    "subject__instance_images": subject_dir(name),
                    "storage__root": folder,
                    "storage__prior": class_images,
                    "tracking__uri": f"sqlite:///{folder}/mlflow.db",
                    "evaluation__enabled": "false",
                }
                | settings
            )
            for name in subjects
        ]
        configs = [_poisoned(config) if config.subject.name == poisoned else config for config in configs]
        folder.mkdir(parents=True, exist_ok=True)
        return make_batch_plan("batch", [make_plan(config, FOUR_CPUS) for config in configs], FOUR_CPUS)

    return make


def _poisoned(config: DreamBoothConfig) -> DreamBoothConfig:
    """With noise that no configuration may ask for, so that the loss stops being a number."""
    return config.model_copy(update={"train": config.train.model_copy(update={"noise_offset": 1e30})})


def weights(plan: BatchPlan) -> dict[str, dict[str, str]]:
    """sha256 of every file of every subject's published model."""
    found = {}
    for subject in plan.subjects:
        manifest = published(join(subject.config.run_uri, "model"))
        assert manifest is not None, subject.config.subject.name
        found[subject.config.subject.name] = {name: record.sha256 for name, record in manifest.files.items()}
    return found


def history(plan: BatchPlan, name: str) -> list[tuple[float, float]]:
    [subject] = [subject for subject in plan.subjects if subject.config.subject.name == name]
    record = read_json(join(subject.config.run_uri, "training", f"{subject.key}.json"))
    return [(step["step"], step["loss"]) for step in record["history"]]


def states(outcome: BatchOutcome) -> dict[str, str]:
    return {row["subject"]: row["state"] for row in outcome.summary["results"]}


def actors(title: str) -> list[psutil.Process]:
    """Processes of this process's own Ray whose title this expression finds."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if re.search(title, " ".join(process.cmdline())):
                found.append(process)
    assert found, title
    return found


def rank_1(root: str, names: Sequence[str]) -> float:
    """The share of samples whose nearest photograph is their subject's, by numpy, from what the runs stored."""
    uris = [read_json(join(root, name, "summary.json"))["evaluation"]["uri"] for name in names]
    pairs = [read_embeddings(Path(embeddings_uri(uri)).read_bytes()) for uri in uris]
    gallery = np.concatenate([photographs.numpy() for _, photographs in pairs])
    owner = np.repeat(np.arange(len(names)), [len(photographs) for _, photographs in pairs])
    hits = [owner[(samples.numpy() @ gallery.T).argmax(axis=1)] == own for own, (samples, _) in enumerate(pairs)]
    return float(np.mean([each.mean() for each in hits]))


def points_of(plan: BatchPlan, name: str) -> int:
    """The number of points that a subject's curve of the loss has in MLflow now."""
    with quietly():
        client = connect(plan.subjects[0].config.tracking.uri or "")
        if (experiment := client.get_experiment_by_name("dreambooth")) is None:
            return 0
        runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        return sum(len(client.get_metric_history(run.info.run_id, "train/loss")) for run in runs)


class IdleLanes:
    """Lanes of one thread, which takes every subject from the queue and reports it trained at once."""

    def __init__(self, plan: BatchPlan, driver: str, queue: Any, encoder: str | None) -> None:
        self.errors: list[str] = []
        self._lane, self._queue = f"{driver}/0", queue
        self._thread = threading.Thread(target=self._work)

    def start(self) -> None:
        self._thread.start()

    def tend(self, settled: int) -> bool:
        return self._thread.is_alive()

    def _work(self) -> None:
        import ray

        while (work := ray.get(self._queue.next.remote(self._lane))) is not None:
            ray.get(self._queue.trained.remote(work.task.config.subject.name))


@pytest.mark.usefixtures("ray_session")
def test_published_subjects_are_concluded_one_right_after_the_other(
    make_batch: Callable[..., BatchPlan], tmp_path: Path
) -> None:
    plan = make_batch(tmp_path, *subject_names(), prior__prior_loss_weight=0)
    began: list[float] = []

    def mlflow_is_away(plan: Plan, batch_run_id: str, batch_uri: str) -> str:
        began.append(time.monotonic())
        raise Away("nobody answers")

    outcome = run_batch(plan, Silent(), None, make_lanes=IdleLanes, conclude=mlflow_is_away)
    assert outcome.summary["untracked"] == "nobody answers"
    assert len(began) == 2  # the first to find it away, and one more try at the end, whoever waits behind it

    def write_nothing(plan: Plan, batch_run_id: str, batch_uri: str) -> str:
        began.append(time.monotonic())
        return ""

    began.clear()
    outcome = run_batch(plan, Silent(), None, make_lanes=IdleLanes, conclude=write_nothing)
    assert set(states(outcome).values()) == {"done"}
    assert len(began) == len(plan.subjects)
    assert began[-1] - began[0] < 0.1 * len(began)  # not one at each look of the driver


@pytest.mark.usefixtures("ray_session")
def test_a_result_does_not_depend_on_which_subjects_went_before(
    make_batch: Callable[..., BatchPlan], tmp_path: Path
) -> None:
    names = ("coral-car", "navy-dog", "lime-car")
    measured = {
        "evaluation__enabled": "true",
        "evaluation__protocol": "own",
        "evaluation__bank": "miniature",
        "evaluation__prompts": "['[V] {class_noun} at night']",
        "gate__pres_limit": 1,
    }
    forth = make_batch(tmp_path / "forth", *names, cluster__lanes=1, **measured)
    outcome = run_batch(forth, Silent(), "miniature")
    assert set(states(outcome).values()) == {"done"}
    assert outcome.failed == 0

    back = make_batch(tmp_path / "back", *names, cluster__lanes=1)
    back = make_batch_plan("batch", back.subjects[::-1], FOUR_CPUS)
    tried: list[str] = []

    def conclude_at_the_second_try(plan: Plan, batch_run_id: str, batch_uri: str) -> str:
        tried.append(plan.config.subject.name)
        if tried.count(plan.config.subject.name) == 1:
            raise OSError("the registry is away")
        return conclude(plan, batch_run_id, batch_uri)

    registered = run_batch(back, Silent(), None, conclude=conclude_at_the_second_try)
    assert set(states(registered).values()) == {"done"}
    assert {row["attempts"] for row in registered.summary["results"]} == {1}  # nobody was trained again
    assert weights(back) == weights(forth)
    assert all(history(back, name) == history(forth, name) for name in names)

    page = Path(outcome.summary["report"]).read_text()
    assert all(name in page for name in names)
    for row in outcome.summary["results"]:
        assert row["registered"] == f"dreambooth-{row['subject']} version 1"
        assert -1 <= row["similarity_identifier"] <= 1
        summary = read_json(join(str(tmp_path), "forth", row["subject"], "summary.json"))
        assert summary["evaluation"]["figures"]["dino"] == {"n": 1} | dict.fromkeys(
            ("mean", "low", "high"), row["miniature_dino"]
        )
        assert summary["evaluation"]["gate"]["moved"]
        assert re.search(r"\| DINO \| -?[\d.]+ \|.*\n\nBank miniature ", Path(summary["card"]).read_text(), re.DOTALL)
    assert "<h2>Retrieval</h2>" in page
    [retrieval] = outcome.summary["retrieval"]
    assert retrieval["subjects"] == 3
    assert retrieval["rank_1"]["mean"] == pytest.approx(rank_1(str(tmp_path / "forth"), names))
    with quietly():
        client = connect(forth.subjects[0].config.tracking.uri or "")
        experiment = client.get_experiment_by_name("dreambooth")
        assert experiment is not None
        parent = outcome.summary["mlflow"]["run_id"]
        nested = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
        assert {run.info.run_name for run in nested} == set(names)
        assert {artifact.path for artifact in client.list_artifacts(parent)} >= {"report.html", "subjects.json"}

    again = run_batch(forth, Silent(), "miniature")
    assert [row["registered"] for row in again.summary["results"]] == [
        row["registered"] for row in outcome.summary["results"]
    ]
    assert {row["attempts"] for row in again.summary["results"]} == {1}


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


@pytest.mark.usefixtures("ray_session")
def test_a_stop_reaches_a_training_of_slow_steps_whose_curves_grow(
    make_batch: Callable[..., BatchPlan], mlflow_database: str, tmp_path: Path
) -> None:
    settings = {"train__max_train_steps": 80, "train__gradient_accumulation_steps": 60, "prior__prior_loss_weight": 0}
    shutil.copyfile(mlflow_database.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    plan = make_batch(tmp_path, "coral-car", **settings)
    seen: list[int] = []
    curves: list[int] = []

    def interrupt_when_grown(running: Mapping[str, Progress]) -> None:
        seen.append(running["coral-car"].step if "coral-car" in running else 0)
        if seen[-1] and len(set(curves)) < 2 and (points := points_of(plan, "coral-car")):
            curves.append(points)
            if len(set(curves)) == 2:
                raise KeyboardInterrupt

    assert run_batch(plan, Silent(interrupt_when_grown), None).interrupted
    assert 0 < curves[0] < curves[-1] < 80
    assert max(seen) < 80
    [subject] = plan.subjects
    assert published(join(subject.config.run_uri, "model")) is None
    assert list(Path(subject.config.run_uri).glob("checkpoints/*/*/manifest.json"))


@pytest.mark.usefixtures("ray_session")
def test_a_stop_while_samples_are_made_does_not_wait_for_them_nor_lose_what_was_trained(
    make_batch: Callable[..., BatchPlan], tmp_path: Path
) -> None:
    settings = {"evaluation__enabled": "true", "evaluation__images_per_prompt": 400, "train__max_train_steps": 4}
    plan = make_batch(tmp_path, "coral-car", **settings)
    seen: list[tuple[int, int]] = []

    def interrupt(running: Mapping[str, Progress]) -> None:
        pictures = running["coral-car"].pictures if "coral-car" in running else None
        if pictures is not None:
            seen.append(pictures)
            if len(seen) == 1:
                raise KeyboardInterrupt

    stopped = run_batch(plan, Silent(interrupt), None)
    assert stopped.interrupted
    made, total = seen[-1]
    assert made < total
    [subject] = plan.subjects
    before = published(join(subject.config.run_uri, "model"))
    assert before is not None

    fewer = make_batch(tmp_path, "coral-car", **settings | {"evaluation__images_per_prompt": 1})
    assert fewer.subjects[0].key == subject.key
    finished = run_batch(fewer, Silent(), None)
    assert states(finished) == {"coral-car": "done"}
    assert published(join(subject.config.run_uri, "model")) == before


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("how", ["run", "batch"])
def test_it_ends_early_and_keeps_the_best_step(make_batch: Callable[..., BatchPlan], tmp_path: Path, how: str) -> None:
    scored = {"train__keep": "best", "train__stop_after": 1, "evaluation__every": 1, "evaluation__score_images": 1}
    scored |= {"evaluation__bank": "miniature", "evaluation__prompts": "['[V] {class_noun} at night']"}
    plan = make_batch(tmp_path, "coral-car", train__max_train_steps=60, prior__prior_loss_weight=0, **scored)
    [subject] = plan.subjects
    if how == "run":
        personalize(subject.config)
    else:
        assert states(run_batch(plan, Silent(), None)) == {"coral-car": "done"}
    record = read_json(join(subject.config.run_uri, "training", f"{subject.key}.json"))
    scores = [score["score"] for score in record["scores"]]
    assert record["steps"] == len(scores) == len(record["history"]) < 60
    assert max(scores) == scores[-2] >= scores[-1]
    assert record["exported_step"] == record["steps"] - 1
    model = published(join(subject.config.run_uri, "model"))
    assert model is not None
    assert model.metadata["step"] == record["exported_step"]


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
    assert "same command goes on" in interrupted.stderr
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
