"""Waiting for Ray's processes."""

from collections.abc import Callable

import pytest

from pipelines.cluster.patience import patient_start, patiently


def answering_after(times: int) -> tuple[list[int], Callable[[], str]]:
    asked: list[int] = []

    def ask() -> str:
        asked.append(len(asked))
        if len(asked) <= times:
            raise RuntimeError("no such node")
        return "the node"

    return asked, ask


def test_it_asks_until_there_is_an_answer() -> None:
    asked, ask = answering_after(3)
    assert patiently(ask, seconds=60, alive=lambda: True, pause=0) == "the node"
    assert len(asked) == 4


def test_a_process_that_died_is_not_waited_for() -> None:
    asked, ask = answering_after(3)
    with pytest.raises(RuntimeError, match="no such node"):
        patiently(ask, seconds=60, alive=lambda: False, pause=0)
    assert len(asked) == 1


def test_it_gives_up() -> None:
    asked, ask = answering_after(10**9)
    with pytest.raises(RuntimeError, match="no such node"):
        patiently(ask, seconds=0.05, alive=lambda: True, pause=0.01)
    assert len(asked) > 1


def test_ray_asks_as_before_afterwards() -> None:
    from ray._private import services

    before = services.get_node
    with pytest.raises(ZeroDivisionError), patient_start():
        assert 1 / (services.get_node is before)
    assert services.get_node is before
