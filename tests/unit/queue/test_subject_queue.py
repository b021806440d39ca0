"""The queue of a batch: who gets what when, and that its state survives whoever holds it."""

import dataclasses
import errno
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dreambooth.config.settings import load_config
from dreambooth.data.inspection import inspect_addresses
from dreambooth.sampling.class_images import PriorPlan, image_name
from pipelines.queue.subject_queue import QueuedSubject, SubjectQueue
from pipelines.stages.prior_stage import seal
from pipelines.stages.protocol_task import bank_address, protocol_of_subject
from pipelines.storage.faults import StoreAway
from pipelines.storage.files import join, read_json, write_bytes
from pipelines.tasks import MakeClassImages, Measurement, Progress, SubjectRecord, TrainSubject, TrainTask, Wait

LANE, OTHER = "driver/0", "driver/1"


@pytest.fixture
def uri() -> Iterator[str]:
    import fsspec

    yield "memory://batch"
    fs = fsspec.filesystem("memory")
    if fs.exists("/batch"):
        fs.rm("/batch", recursive=True)


def prior(class_noun: str, count: int = 4) -> PriorPlan:
    return PriorPlan(
        base_hash="0" * 16,
        class_prompt=f"a photo of a {class_noun}",
        resolution=64,
        num_inference_steps=2,
        guidance_scale=4.0,
        batch_size=2,
        seed=0,
        dtype="float32",
        sampler="dpm-solver++",
        count=count,
    )


def queued(name: str, class_noun: str | None = None, *, key: str = "k", count: int = 4) -> QueuedSubject:
    config = load_config(
        {
            "subject": {"name": name, "class_noun": "dog", "identifier": "tfz", "instance_images": "x"},
            "storage": {"root": "memory://batch"},
        }
    )
    task = TrainTask(
        config=config,
        images=(),
        prior_set=None,
        engine="torch",
        key=key,
        data_hash="",
        base_hash="0" * 16,
        checkpoint_bytes=0,
        sampling_dtype="float32",
    )
    record = SubjectRecord(name=name, key=key, class_noun="dog", identifier="tfz")
    return QueuedSubject(record=record, task=task, prior=None if class_noun is None else prior(class_noun, count))


@pytest.fixture
def make(uri: str) -> Callable[..., SubjectQueue]:
    def make(*subjects: QueuedSubject, driver: str = "driver", retries: int = 1) -> SubjectQueue:
        return SubjectQueue(uri, driver, subjects, retries=retries)

    return make


def name_of(work: Any) -> str:
    assert isinstance(work, TrainSubject), work
    return work.task.config.subject.name


def finish(queue: SubjectQueue, name: str) -> None:
    queue.trained(name)
    queue.done(name)


def write(work: MakeClassImages) -> set[int]:
    indices = set(itertools.chain(*work.wanted))
    for index in indices:
        write_bytes(join(work.uri, image_name(index)), b"png")
    return indices


def test_subjects_go_out_in_order_each_to_one_lane(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("a"), queued("b"))
    assert [name_of(queue.next(LANE)), name_of(queue.next(OTHER))] == ["a", "b"]
    assert isinstance(queue.next("driver/2"), Wait)  # one of them may fail and come back
    finish(queue, "a")
    finish(queue, "b")
    assert queue.next(LANE) is None
    assert queue.snapshot().finished


def test_the_more_lanes_the_less_often_each_asks(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("a"))
    assert name_of(queue.next(LANE)) == "a"
    alone = queue.next(OTHER)
    many = [queue.next(f"driver/{number}") for number in range(2, 500)][-1]
    assert isinstance(alone, Wait)
    assert isinstance(many, Wait)
    assert alone.seconds == 0.2
    assert many.seconds == 5.0


def test_a_lane_may_go_on_while_it_publishes(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("a"), queued("b"))
    assert name_of(queue.next(LANE)) == "a"
    assert name_of(queue.next(LANE, holding=["a"])) == "b"
    finish(queue, "a")
    assert queue.snapshot().counts["training"] == 1


def test_what_a_lane_lost_is_tried_again_and_then_set_aside(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("a"), retries=1)
    assert name_of(queue.next(LANE, fresh=True)) == "a"
    assert name_of(queue.next(LANE, fresh=True)) == "a"  # its workers are new: the old ones died with the subject
    assert queue.next(LANE, fresh=True) is None
    [(name, reason)] = queue.snapshot().failures
    assert name == "a"
    assert "worker died" in reason


def test_a_lane_that_grows_or_shrinks_is_no_failure(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("a"), retries=0)
    assert name_of(queue.next(LANE, count=2, fresh=True)) == "a"
    assert name_of(queue.next(LANE, count=1, fresh=True)) == "a"
    assert name_of(queue.next(LANE, count=2, fresh=True)) == "a"
    assert queue.records()[0].failures == 0


def test_a_call_that_is_repeated_is_no_failure(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("a"), retries=0)
    assert name_of(queue.next(LANE, fresh=True)) == "a"
    assert name_of(queue.next(LANE)) == "a"
    assert queue.records()[0].failures == 0


def test_a_failure_goes_to_the_end_and_keeps_its_reason(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("bad"), queued("good"), retries=1)
    assert name_of(queue.next(LANE)) == "bad"
    queue.failed("bad", "ValueError: no", "Traceback …")
    assert name_of(queue.next(LANE)) == "good"
    finish(queue, "good")
    assert name_of(queue.next(LANE)) == "bad"
    queue.failed("bad", "ValueError: no", "Traceback …")
    assert queue.next(LANE) is None
    record = queue.records()[0]
    assert (record.state, record.attempts, record.failures, record.traceback) == ("failed", 2, 2, "Traceback …")
    assert queue.snapshot().finished


def test_a_subject_starts_when_its_own_class_is_ready(make: Callable[..., SubjectQueue], uri: str) -> None:
    queue = make(queued("rex", "dog"), queued("mug", "cup"), queued("free"))
    assert name_of(queue.next(LANE)) == "free"
    first, second = queue.next(OTHER), queue.next("driver/2")
    assert isinstance(first, MakeClassImages)
    assert isinstance(second, MakeClassImages)
    assert first.plan.class_prompt == second.plan.class_prompt == "a photo of a dog"
    assert (first.blocks, second.blocks) == ((range(2),), (range(2, 4),))
    queue.made(OTHER, first.plan.key, write(first))
    third = queue.next(OTHER)
    assert isinstance(third, MakeClassImages)
    assert third.plan.class_prompt == "a photo of a cup"
    queue.made("driver/2", second.plan.key, write(second))
    complete = queue.next("driver/2")
    assert isinstance(complete, MakeClassImages)
    assert (complete.blocks, complete.plan.class_prompt) == ((), "a photo of a dog")
    last = queue.next("driver/3")
    assert isinstance(last, MakeClassImages)
    assert last.blocks  # one lane seals a set
    seal(complete.parent_uri, complete.plan)
    queue.sealed("driver/2", complete.plan.key)
    assert name_of(queue.next("driver/2")) == "rex"
    assert queue.snapshot().class_images == (4, 8)


def test_a_set_that_a_lost_lane_was_to_seal_is_sealed_by_another(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("rex", "dog"))
    work = queue.next(LANE, count=2)
    assert isinstance(work, MakeClassImages)
    queue.made(LANE, work.plan.key, write(work))
    assert queue.next(LANE) == MakeClassImages(plan=work.plan, source=work.source, parent_uri=work.parent_uri)
    assert isinstance(queue.next(OTHER), Wait)
    queue.lane_ended(LANE)
    assert queue.next(OTHER) == MakeClassImages(plan=work.plan, source=work.source, parent_uri=work.parent_uri)


def test_what_lanes_report_is_taken_once(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("a"))
    assert name_of(queue.next(LANE)) == "a"
    progress = Progress(step=1, steps=4, images_per_second=2.0, loss=0.5)
    assert not queue.progress("a", progress, ({"kind": "step"}, {"kind": "score"}))
    assert queue.snapshot().running == {"a": progress}
    assert queue.messages() == (("a", {"kind": "step"}), ("a", {"kind": "score"}))
    assert queue.messages() == ()
    queue.stop()
    assert queue.progress("a", progress)


def test_a_failure_that_would_come_again_is_not_tried_again(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("full"), retries=3)
    assert name_of(queue.next(LANE)) == "full"
    queue.failed("full", "no space is left there", final=True)
    assert queue.next(LANE) is None
    assert queue.snapshot().failures == (("full", "no space is left there"),)


def test_on_a_full_disk_a_failure_is_still_told(
    make: Callable[..., SubjectQueue], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make(queued("full"))
    assert name_of(queue.next(LANE)) == "full"

    def write(uri: str, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipelines.queue.subject_queue.write_json", write)
    queue.failed("full", "no space is left there", final=True)
    assert queue.snapshot().failures == (("full", "no space is left there"),)
    assert queue.snapshot().finished


def test_blocks_of_a_lost_lane_are_made_by_another(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("rex", "dog"))
    assert isinstance(queue.next(LANE, count=2), MakeClassImages)
    assert isinstance(queue.next(OTHER), Wait)
    queue.lane_ended(LANE)
    again = queue.next(OTHER, count=2)
    assert isinstance(again, MakeClassImages)
    assert set(again.blocks) == {range(2), range(2, 4)}


def test_a_lane_gets_several_blocks_and_tells_of_each(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("rex", "dog", count=16))
    first = queue.next(LANE)
    assert isinstance(first, MakeClassImages)
    assert first.blocks == (range(2), range(2, 4), range(4, 6), range(6, 8))  # half of what there is
    second = queue.next(OTHER)
    assert isinstance(second, MakeClassImages)
    assert second.blocks == (range(8, 10),)  # half of a half
    assert queue.made(LANE, first.plan.key, {2, 3}) is False
    assert queue.snapshot().class_images == (2, 16)
    queue.lane_ended(LANE)
    left = set[range]()
    while isinstance(work := queue.next("driver/2"), MakeClassImages):
        left.update(work.blocks)
        for wanted in work.wanted:
            queue.made("driver/2", work.plan.key, wanted)
    assert left == {range(start, start + 2) for start in (0, 4, 6, 10, 12, 14)}
    queue.stop()
    assert queue.made(OTHER, first.plan.key, {8, 9}) is True
    assert queue.snapshot().class_images == (16, 16)


def test_blocks_that_a_lost_lane_wrote_after_all_are_not_made_for_ever(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("rex", "dog", count=2))
    work = queue.next(LANE)
    assert isinstance(work, MakeClassImages)
    queue.lane_ended(LANE)
    queue.made(LANE, work.plan.key, write(work))
    again = queue.next(OTHER)
    assert isinstance(again, MakeClassImages)
    assert not any(again.wanted)
    complete = queue.next(OTHER)
    assert isinstance(complete, MakeClassImages)
    assert not complete.blocks


def test_what_was_on_a_lost_node_goes_to_others_and_is_no_failure(make: Callable[..., SubjectQueue]) -> None:
    here, there = frozenset({"here"}), frozenset({"there"})
    queue = make(queued("a"), queued("b", "dog"), retries=0)
    assert name_of(queue.next(LANE, fresh=True, nodes=there)) == "a"
    blocks = queue.next("driver/2", fresh=True, nodes=there)
    assert isinstance(blocks, MakeClassImages)
    assert queue.snapshot().nodes == {LANE: there, "driver/2": there}
    for lane in (LANE, "driver/2"):
        queue.nodes_lost(lane, there)
    assert name_of(queue.next(OTHER, fresh=True, nodes=here)) == "a"
    assert queue.snapshot().failures == ()
    again = [queue.next(f"driver/{lane}", fresh=True, nodes=here) for lane in (3, 4)]
    assert {block for work in again for block in work.blocks} >= set(blocks.blocks)


def test_a_lane_that_has_new_workers_keeps_what_they_do(make: Callable[..., SubjectQueue]) -> None:
    old, new = frozenset({"old"}), frozenset({"new"})
    queue = make(queued("a"))
    assert name_of(queue.next(LANE, fresh=True, nodes=old)) == "a"
    assert name_of(queue.next(LANE, fresh=True, nodes=new)) == "a"
    queue.nodes_lost(LANE, old)
    assert isinstance(queue.next(OTHER), Wait)


def test_workers_on_other_nodes_are_no_failure_of_their_subject(make: Callable[..., SubjectQueue]) -> None:
    old, new = frozenset({"old", "gone"}), frozenset({"old"})
    queue = make(queued("a"), retries=0)
    assert name_of(queue.next(LANE, fresh=True, nodes=old)) == "a"
    assert name_of(queue.next(LANE, fresh=True, nodes=new)) == "a"
    assert queue.next(LANE, fresh=True, nodes=new) is None
    assert queue.snapshot().counts["failed"] == 1


def test_a_queue_made_again_believes_the_driver_about_nodes(make: Callable[..., SubjectQueue]) -> None:
    old = frozenset({"old"})
    assert name_of(make(queued("a")).next(LANE, fresh=True, nodes=old)) == "a"
    queue = make(queued("a"))
    assert isinstance(queue.next(OTHER), Wait)
    queue.nodes_lost(LANE, old)
    assert name_of(queue.next(OTHER)) == "a"


def test_a_set_is_as_large_as_any_subject_wants(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("rex", "dog", count=2), queued("fido", "dog", count=6))
    assert queue.snapshot().class_images == (0, 6)


def test_class_images_that_are_there_are_not_made_again(make: Callable[..., SubjectQueue], uri: str) -> None:
    plan = prior("dog")
    for index in range(3):
        write_bytes(join(uri, "prior", plan.key, image_name(index)), b"png")
    work = make(queued("rex", "dog")).next(LANE, count=4)
    assert isinstance(work, MakeClassImages)
    assert (work.blocks, work.wanted) == ((range(2, 4),), ((3,),))


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
    subject, protocol = replace(plain, task=task), protocol_of_subject(task)
    assert protocol is not None
    queue = make(subject)
    queue.next(LANE)
    queue.trained("a")
    assert name_of(make(subject, driver="another").next("another/0")) == "a"
    write_bytes(protocol.uri, b"{}")
    queue.trained("a")
    assert make(subject, driver="a third").snapshot().trained == ("a",)


def test_what_could_not_be_registered_is_not_trained_again(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("a"), retries=1)
    queue.next(LANE)
    queue.trained("a")
    queue.unregistered("a", "OperationalError: locked")
    assert queue.snapshot().trained == ("a",)
    assert queue.next(LANE) is None
    queue.unregistered("a", "OperationalError: locked")
    assert queue.snapshot().finished
    assert queue.snapshot().failures == (("a", "OperationalError: locked"),)


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


def test_stopping_hands_out_nothing_and_tells_lanes(make: Callable[..., SubjectQueue]) -> None:
    from pipelines.tasks import Progress

    queue = make(queued("a"), queued("b"))
    assert name_of(queue.next(LANE)) == "a"
    progress = Progress(step=1, steps=9, images_per_second=1.0, loss=0.1)
    assert queue.progress("a", progress) is False
    queue.stop()
    assert queue.progress("a", progress) is True
    queue.released("a")
    assert queue.next(LANE) is None
    assert queue.snapshot().counts["waiting"] == 2
    assert queue.records()[0].failures == 0


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
