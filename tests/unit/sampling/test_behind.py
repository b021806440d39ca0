"""Work behind the sampling: in order, one group while the next one is made, and nothing that was started is lost."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from dreambooth.sampling.behind import behind

DEVICES = ["cpu", "cuda"]  # one thread, or several


@pytest.mark.parametrize("device", DEVICES)
def test_results_come_in_order_by_group(device: str) -> None:
    def late(value: int) -> int:
        time.sleep(0.002 * (value % 3))
        return value

    groups = [[partial(late, value) for value in group] for group in ((5, 4, 3), (), (2,), (1, 0))]
    assert list(behind(groups, device)) == [[5, 4, 3], [2], [1, 0]]
    assert list(behind([], device)) == []


def test_a_group_runs_while_the_next_one_is_made() -> None:
    ran = [threading.Event() for _ in range(3)]

    def groups() -> Iterator[list[Callable[[], None]]]:
        yield [ran[0].set]
        assert ran[0].wait(10)  # else the first waits for the second, and this never ends
        yield [ran[1].set]
        assert ran[1].wait(10)
        yield [ran[2].set]

    assert len(list(behind(groups(), "cpu"))) == 3


def test_no_more_than_one_group_waits_while_another_is_made() -> None:
    made, ended = [], []

    def call(group: int) -> None:
        time.sleep(0.01)
        ended.append(group)

    def groups() -> Iterator[list[Callable[[], None]]]:
        for group in range(6):
            assert len(made) - len(ended) <= 1
            made.append(group)
            yield [partial(call, group)]

    assert len(list(behind(groups(), "cpu"))) == 6


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_call_raises_is_raised_and_all_that_was_started_ends(device: str) -> None:
    written: list[int] = []

    def write(value: int) -> int:
        time.sleep(0.002)
        if value == 2:
            raise OSError("no space left")
        written.append(value)
        return value

    results: Any = behind(([partial(write, 2 * group + i) for i in range(2)] for group in range(9)), device)
    assert next(results) == [0, 1]
    with pytest.raises(OSError, match="no space left"):
        next(results)
    assert sorted(written) == [0, 1, 3, 4, 5]  # the group of the failure, and the one that was made meanwhile


def test_where_no_next_group_can_be_made_the_last_one_still_ends() -> None:
    written: list[int] = []

    def groups() -> Iterator[list[Callable[[], None]]]:
        yield [partial(written.append, 0), partial(written.append, 1)]
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(behind(groups(), "cpu"))
    assert written == [0, 1]
