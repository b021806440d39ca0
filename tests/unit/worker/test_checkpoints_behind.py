"""Checkpoints behind the training: when one is begun, what is waited for, and where a failed one is heard of."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from dreambooth.config.train import TrainConfig
from pipelines.storage.faults import StorageFull
from pipelines.worker.behind import Behind
from pipelines.worker.checkpoint_hook import Checkpoint
from pipelines.worker.history import History

METRICS: Any = object()


class Engine:
    rank = 0
    reserved = 0

    def reserve_snapshot(self) -> None:
        self.reserved += 1


class Uploads:
    """Checkpoints of which each is written until `let_through` is set, and then fails if there is an error."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.let_through = threading.Event()
        self.error: Exception | None = None

    def restore(self, engine: Any) -> History:
        return History()

    def begin(self, engine: Any, history: History) -> Behind:
        self.steps.append(history.step)

        def upload() -> None:
            assert self.let_through.wait(30)
            if self.error is not None:
                raise self.error

        return Behind(upload)


class Training:
    """Steps of a loop whose only hook is that of checkpoints."""

    def __init__(self, **settings: Any) -> None:
        self.uploads, self.engine, self.history = Uploads(), Engine(), History()
        self.messages: list[dict[str, Any]] = []
        self.asked: list[bool] = []
        train = TrainConfig(max_train_steps=100, **settings)
        self.hook = Checkpoint(self.uploads, self.engine, self.history, train, self.messages.append, self._any_rank)

    def _any_rank(self, here: bool) -> bool:
        self.asked.append(here)
        return here

    def go(self, until: int, metrics: Callable[[int], bool] = lambda step: True) -> list[int]:
        """Train until a step; returns the steps of the checkpoints begun so far."""
        while self.history.step < until:
            self.history.step += 1
            self.hook.on_step(self.history.step, METRICS if metrics(self.history.step) else None)
        return self.uploads.steps

    def let_through(self) -> None:
        self.uploads.let_through.set()
        assert self.hook._writing is not None
        self.hook._writing.wait()


def test_training_goes_on_and_the_next_waits_for_the_one_before() -> None:
    training = Training(checkpoint_every=4)
    assert training.go(10) == [4]  # that of step 8 is due
    assert training.messages == []
    training.let_through()
    assert training.go(11) == [4, 11]
    assert [(message["kind"], message["step"]) for message in training.messages] == [("checkpoint", 4)]
    training.let_through()
    assert training.go(15) == [4, 11, 12]
    assert training.engine.reserved == 1


def test_none_is_begun_of_a_step_whose_loss_nobody_knows() -> None:
    training = Training(checkpoint_every=4)
    training.uploads.let_through.set()
    assert training.go(9, metrics=lambda step: step in (3, 6)) == [6]


@pytest.mark.parametrize("where", ["the next step", "the end", "leaving"])
def test_a_failed_one_is_heard_of_once(where: str) -> None:
    training = Training(checkpoint_every=4)
    training.uploads.error = StorageFull("can't write the checkpoint of step 4")
    training.go(5)
    training.let_through()
    ask = {
        "the next step": lambda: training.go(6),
        "the end": training.hook.settle,
        "leaving": lambda: training.hook.save(5),
    }
    with pytest.raises(StorageFull, match="can't write the checkpoint of step 4"):
        ask[where]()
    training.hook.settle()
    training.hook.abandon()
    assert training.messages == []


def test_who_leaves_waits_until_all_is_whole_and_writes_no_step_twice() -> None:
    training = Training(checkpoint_every=4)
    training.go(5)
    threading.Timer(0.1, training.uploads.let_through.set).start()
    training.hook.save(5)
    assert training.uploads.steps == [4, 5]
    assert [message["step"] for message in training.messages] == [4, 5]
    training.hook.save(5)
    assert training.uploads.steps == [4, 5]


def test_the_end_of_one_that_is_given_up_is_waited_for() -> None:
    training = Training(checkpoint_every=4)
    training.uploads.error = ZeroDivisionError()
    training.go(5)
    threading.Timer(0.1, training.uploads.let_through.set).start()
    training.hook.abandon()
    assert training.uploads.let_through.is_set()
    assert training.messages == []


def test_an_interval_of_time_beside_that_of_steps() -> None:
    training = Training(checkpoint_every=50, checkpoint_every_minutes=0.2 / 60)
    training.uploads.let_through.set()
    assert training.go(3) == []
    time.sleep(0.25)
    assert training.go(5) == [4]
    assert training.engine.reserved == 1
    time.sleep(0.25)
    assert training.go(7) == [4, 6]


def test_the_time_is_that_of_rank_0() -> None:
    training = Training(checkpoint_every=50, checkpoint_every_minutes=0.001 / 60)
    training.engine.rank = 1
    time.sleep(0.01)
    assert training.go(3) == []
    assert training.asked == [False, False, False]  # collective: asked on every rank alike


def test_none_is_begun_after_the_last_step_nor_memory_reserved_for_none() -> None:
    training = Training(checkpoint_every=100)
    assert training.go(100) == []
    assert training.engine.reserved == 0


def test_work_behind_keeps_its_error_until_it_is_asked() -> None:
    def fail() -> None:
        raise ZeroDivisionError("behind")

    work = Behind(fail)
    work.wait()
    assert work.ended
    with pytest.raises(ZeroDivisionError, match="behind"):
        work.result()
