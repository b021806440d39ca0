"""The queue's state survives whoever holds it."""

import dataclasses
import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from queued import LANE, OTHER, finish, name_of, queued

from dreambooth.config.settings import load_config
from dreambooth.data.inspection import inspect_addresses
from pipelines.queue.subject_queue import SubjectQueue
from pipelines.stages.evaluation_task import bank_address, tasks_of_subject
from pipelines.storage.faults import StoreAway
from pipelines.storage.files import join, read_json, write_bytes
from pipelines.tasks import Measurement, SubjectRecord


def test_the_same_command_later_does_only_what_is_missing(make: Callable[..., SubjectQueue]) -> None:
    subjects = [queued(name) for name in ("done", "trained", "training", "failed", "waiting")]
    queue = make(*subjects, retries=0)
    for name in ("done", "trained", "training", "failed"):
        assert name_of(queue.next(f"driver/{name}")) == name
    finish(queue, "done")
    queue.trained("trained")
    queue.failed("failed", "reason")

    later = make(*subjects, driver="another", retries=0)
    assert later.snapshot().counts == {"waiting": 3, "training": 0, "trained": 1, "done": 1, "failed": 0}
    assert later.snapshot().trained == ("trained",)
    taken = [name_of(later.next(f"another/{i}")) for i in range(3)]
    assert taken == ["training", "failed", "waiting"]


def test_one_whose_figures_earlier_code_measured_on_what_is_no_longer_trusted_is_measured_again(
    make: Callable[..., SubjectQueue], instance_folder: Path
) -> None:
    plain = queued("a")
    config = load_config(
        {
            "subject": {"name": "a", "class_noun": "dog", "identifier": "tfz", "instance_images": str(instance_folder)},
            "base_model": "miniature",
            "images": {"resolution": 64},
            "storage": {"root": "memory://batch"},
            "evaluation": {"protocol": "auto"},
        }
    )
    inspection = inspect_addresses(config.subject.instance_images, resolution=64, max_pixels=10**6)
    measurement = Measurement(bank=bank_address(config.evaluation, config.base_model), sampler="dpm-solver++")
    task = replace(plain.task, config=config, images=inspection.images, measurement=measurement)
    subject, (samples, protocol) = replace(plain, task=task), tasks_of_subject(task)
    queue = make(subject)
    queue.next(LANE)
    queue.trained("a")
    assert name_of(make(subject, driver="another").next("another/0")) == "a"
    write_bytes(protocol.uri, b"{}")
    queue.trained("a")
    assert name_of(make(subject, driver="one more").next("one more/0")) == "a"
    write_bytes(samples.uri, b"{}")
    queue.trained("a")
    assert make(subject, driver="a third").snapshot().trained == ("a",)


def test_a_queue_made_again_in_mid_run_keeps_claims(make: Callable[..., SubjectQueue]) -> None:
    subjects = [queued("a"), queued("b")]
    assert name_of(make(*subjects).next(LANE)) == "a"
    again = make(*subjects)
    assert name_of(again.next(OTHER)) == "b"
    finish(again, "a")
    finish(again, "b")
    assert again.snapshot().finished


def test_other_settings_are_another_subject(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("a", key="old"))
    queue.next(LANE)
    finish(queue, "a")
    assert make(queued("a", key="new")).snapshot().counts["waiting"] == 1


def test_state_is_stored_before_anybody_acts_on_it(make: Callable[..., SubjectQueue], uri: str) -> None:
    queue = make(queued("a"))
    queue.next(LANE)
    stored = read_json(join(uri, "subjects", "a.json"))
    assert (stored["state"], stored["lane"], stored["attempts"]) == ("training", LANE, 1)
    assert SubjectRecord.from_dict(stored) == dataclasses.replace(queue.records()[0])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (StoreAway("the store at bucket was away for 60 s"), "the store at bucket was away for 60 s"),
        (PermissionError(errno.EACCES, "Permission denied"), "can't read memory://batch/subjects: "),
        (json.JSONDecodeError("Expecting value", "", 0), "can't read memory://batch/subjects: "),
    ],
)
@pytest.mark.parametrize("call", ["read_records", "images_present"])
def test_a_queue_that_finds_its_store_away_is_halted_from_the_start(
    make: Callable[..., SubjectQueue], monkeypatch: pytest.MonkeyPatch, call: str, error: Exception, said: str
) -> None:
    def away(*_: object) -> Any:
        raise error

    where = "class_image_sets" if call == "images_present" else "subject_queue"
    monkeypatch.setattr(f"pipelines.queue.{where}.{call}", away)
    queue = make(queued("a"), queued("b", "dog"))
    snapshot = queue.snapshot()
    assert snapshot.halted is not None
    assert snapshot.halted.startswith(said)
    assert queue.next(LANE) is None
    assert snapshot.counts["failed"] == 0
    assert sum(snapshot.counts.values()) == len(queue.records()) == 2
