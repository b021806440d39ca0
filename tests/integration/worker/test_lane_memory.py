"""Fifty subjects through the same workers: they hold no more memory at the end than near the beginning."""

from pathlib import Path
from typing import Any

import pytest

from dreambooth.miniature import subject_dir, subject_names
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.batch import run_batch
from pipelines.plan.batch_plan import make_batch_plan
from pipelines.plan.run_plan import make_plan
from pipelines.queue.subject_record import read_records
from pipelines.stages.evaluation_task import encoder_at
from pipelines.storage.files import join, read_json

SUBJECTS, WARM = 50, 5
ROOM = Resources(cpus=4, gpus=0)


class Silent:
    def update(self, *_: object, **__: object) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def message(self, *_: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("ray_session")
def test_a_lane_holds_no_more_memory_after_fifty_subjects_than_after_five(make_config: Any, tmp_path: Path) -> None:
    folders = subject_names()
    configs = [
        make_config(
            subject__name=f"subject-{number:02d}",
            subject__class_noun=folders[number % len(folders)].rsplit("-", 1)[-1],
            subject__identifier=f"x{number}",
            subject__instance_images=subject_dir(folders[number % len(folders)]),
            train__max_train_steps=12,
            train__checkpoint_every=5,
            storage__root=tmp_path / "output",
            tracking__uri=f"sqlite:///{tmp_path}/mlflow.db",
            tracking__register_model="false",
            cluster__lanes=1,
        )
        for number in range(SUBJECTS)
    ]
    plan = make_batch_plan("fifty", [make_plan(config, ROOM) for config in configs], ROOM)
    outcome = run_batch(plan, Silent(), encoder_at("miniature"))
    assert outcome.summary["subjects"]["done"] == SUBJECTS

    records = sorted(read_records(join(plan.uri, "subjects")).values(), key=lambda record: record.began or 0.0)
    assert len({record.lane for record in records}) == 1
    assert {record.attempts for record in records} == {1}
    plans = {subject.config.subject.name: subject for subject in plan.subjects}
    held = []
    for record in records:
        subject = plans[record.name]
        training = read_json(join(subject.config.run_uri, "training", f"{subject.key}.json"))
        [resident] = training["resident_memory_bytes"]
        held.append(resident >> 20)
    print(f"MiB held by the worker at the end of each subject: {held}")
    assert held[-1] < 1.1 * held[WARM - 1]
