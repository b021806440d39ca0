"""Many subjects through warm lanes on a real Ray: what comes out, whoever stops it on the way."""

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import FOUR_CPUS, Silent, history, states, weights

from dreambooth.errors import InputError
from dreambooth.miniature import subject_names
from pipelines.driver.batch import run_batch
from pipelines.driver.conclude import conclude
from pipelines.driver.lock import locked
from pipelines.driver.personalize import personalize
from pipelines.plan.batch_plan import BatchPlan, make_batch_plan
from pipelines.plan.run_plan import Plan
from pipelines.stages.embeddings import embeddings_uri, read_embeddings
from pipelines.stages.evaluation_task import encoder_at
from pipelines.storage.files import join, read_json
from pipelines.storage.publications import published
from pipelines.tasks import Progress
from pipelines.tracking.client import connect, quietly
from pipelines.tracking.line import Away


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

    with locked(plan.uri, say=print), pytest.raises(InputError, match=f"another command is at work in {plan.uri}"):
        run_batch(plan, Silent(), None, make_lanes=IdleLanes, conclude=mlflow_is_away)
    assert not began
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
    outcome = run_batch(forth, Silent(), encoder_at("miniature"))
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

    again = run_batch(forth, Silent(), encoder_at("miniature"))
    assert [row["registered"] for row in again.summary["results"]] == [
        row["registered"] for row in outcome.summary["results"]
    ]
    assert {row["attempts"] for row in again.summary["results"]} == {1}


@pytest.mark.usefixtures("ray_session")
def test_a_stop_reaches_a_training_of_slow_steps_whose_curves_grow(
    make_batch: Callable[..., BatchPlan], tmp_path: Path
) -> None:
    settings = {"train__max_train_steps": 80, "train__gradient_accumulation_steps": 60, "prior__prior_loss_weight": 0}
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
