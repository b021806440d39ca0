"""Class images from the queue: which lane makes which, and when their subjects can start."""

from collections.abc import Callable

from queued import LANE, OTHER, name_of, prior, queued, write

from dreambooth.sampling.class_images import image_name
from pipelines.queue.subject_queue import SubjectQueue
from pipelines.stages.prior_stage import seal
from pipelines.storage.files import join, write_bytes
from pipelines.tasks import MakeClassImages, Wait


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
