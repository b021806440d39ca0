"""Lanes that lose workers or nodes: others get what they had, and what counts as a failure."""

from collections.abc import Callable

from queued import LANE, OTHER, name_of, queued

from pipelines.queue.subject_queue import SubjectQueue
from pipelines.tasks import MakeClassImages, Wait


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


def test_an_error_of_workers_that_lost_one_of_them_is_no_failure(make: Callable[..., SubjectQueue]) -> None:
    """The others fail in a collective before Ray has noticed."""
    both, one = frozenset({"here", "there"}), frozenset({"here"})
    queue = make(queued("a"), retries=0)
    assert name_of(queue.next(LANE, count=2, fresh=True, nodes=both)) == "a"
    queue.broke_off(LANE, "a", "RuntimeError: Connection closed by peer", "Traceback …")
    assert queue.snapshot().counts["training"] == 1  # its old workers may not have ended
    assert name_of(queue.next(LANE, count=1, fresh=True, nodes=one)) == "a"
    queue.broke_off(LANE, "a", "RuntimeError: Connection closed by peer", "Traceback …")
    queue.nodes_lost(LANE, one)
    assert name_of(queue.next(OTHER)) == "a"
    assert queue.records()[0].failures == 0


def test_an_error_of_workers_whose_successors_are_alike_is_a_failure_with_its_reason(
    make: Callable[..., SubjectQueue],
) -> None:
    nodes = frozenset({"here", "there"})
    queue = make(queued("a"), retries=1)
    for _ in range(2):
        assert name_of(queue.next(LANE, count=2, fresh=True, nodes=nodes)) == "a"
        queue.broke_off(LANE, "a", "ValueError: no", "Traceback of rank 1")
        queue.broke_off(LANE, "a", "RuntimeError: Connection closed by peer", "Traceback of rank 0")
    assert queue.lane_ended(LANE) == 1  # set aside
    record = queue.records()[0]
    assert (record.failures, record.reason, record.traceback) == (2, "ValueError: no", "Traceback of rank 1")


def test_an_error_of_a_lane_that_has_the_subject_no_longer_is_not_listened_to(
    make: Callable[..., SubjectQueue],
) -> None:
    queue = make(queued("a"), retries=0)
    assert name_of(queue.next(LANE, count=2, fresh=True)) == "a"
    queue.nodes_lost(LANE, frozenset())
    assert name_of(queue.next(OTHER, fresh=True)) == "a"
    queue.broke_off(LANE, "a", "RuntimeError: late", "Traceback …")
    assert queue.next(OTHER, fresh=True) is None
    assert "worker died" in str(queue.records()[0].reason)


def test_what_is_half_done_goes_before_what_is_not_begun(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("a"), queued("b"), queued("c"))
    assert name_of(queue.next(LANE, count=2, fresh=True)) == "a"
    assert name_of(queue.next(LANE, count=2, holding=["a"])) == "b"
    assert [name_of(queue.next(LANE, count=1, fresh=True)), name_of(queue.next(OTHER))] == ["a", "b"]
    assert {record.failures for record in queue.records()} == {0}


def test_sigterm_of_a_worker_is_no_failure_of_what_it_loses(make: Callable[..., SubjectQueue]) -> None:
    """Also if SIGKILL follows before anything is given back, but only for the workers that were there."""
    queue = make(queued("a"), queued("b"), retries=0)
    assert name_of(queue.next(LANE, count=2, fresh=True)) == "a"
    assert name_of(queue.next(LANE, count=2, holding=["a"])) == "b"  # "a" is being published
    queue.terminated(LANE)
    queue.broke_off(LANE, "b", "RuntimeError: Connection closed by peer", "Traceback …")
    assert name_of(queue.next(LANE, count=2, fresh=True)) == "a"
    assert {record.failures for record in queue.records()} == {0}
    assert name_of(queue.next(LANE, count=2, fresh=True)) == "b"
    assert queue.snapshot().failures[0][0] == "a"


def test_sigterm_of_a_lane_that_has_no_workers_again_is_no_failure(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("a"), retries=0)
    assert name_of(queue.next(LANE, fresh=True)) == "a"
    queue.terminated(LANE)
    assert queue.lane_ended(LANE) == 0
    assert name_of(queue.next(OTHER)) == "a"


def test_a_lane_that_ends_with_a_node_of_its_own_is_no_failure(make: Callable[..., SubjectQueue]) -> None:
    """The driver may see the lane's end before it looks at the nodes."""
    both, one = frozenset({"here", "there"}), frozenset({"here"})
    queue = make(queued("a"), retries=0)
    for lane, there, aside in ((LANE, one, 0), (OTHER, both, 1)):
        assert name_of(queue.next(lane, fresh=True, nodes=both)) == "a"
        assert queue.lane_ended(lane, there) == aside


def test_what_terminated_workers_leave_goes_to_others_at_once(make: Callable[..., SubjectQueue]) -> None:
    queue = make(queued("a"), queued("b", "dog"), retries=0)
    assert name_of(queue.next(LANE, fresh=True)) == "a"
    blocks = queue.next("driver/2", count=2, fresh=True)
    assert isinstance(blocks, MakeClassImages)
    for lane in (LANE, "driver/2"):
        queue.terminated(lane)
        queue.left(lane)
    assert name_of(queue.next(OTHER)) == "a"
    again = queue.next("driver/3", count=2)
    assert isinstance(again, MakeClassImages)
    assert set(again.blocks) == set(blocks.blocks)
    assert {record.failures for record in queue.records()} == {0}
