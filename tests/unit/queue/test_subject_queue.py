"""The queue of a batch: who gets what when, and what becomes of failures."""

import errno
from collections.abc import Callable

import pytest
from queued import LANE, OTHER, finish, name_of, queued

from pipelines.queue.subject_queue import SubjectQueue
from pipelines.tasks import Progress, Wait


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
