"""Batches that are drawn before they are asked for, by other processes, so that a GPU doesn't wait for the pencil."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

Drawn = TypeVar("Drawn")


class Ahead(Generic[Drawn]):
    """`draw(step)` for steps that follow each other; with `processes` 0 it is called when it is asked for.

    A context: the processes end with it. `draw` is sent to each of them once, so it has to be picklable.
    """

    def __init__(self, draw: Callable[[int], Drawn], *, processes: int) -> None:
        self._draw, self._processes = draw, processes
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: deque[tuple[int, Future[Drawn]]] = deque()

    def __enter__(self) -> "Ahead[Drawn]":
        if self._processes:
            # Forked, a child would have this process's CUDA and threads, and can use neither.
            self._pool = ProcessPoolExecutor(
                self._processes, mp_context=get_context("spawn"), initializer=_remember, initargs=(self._draw,)
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> Drawn:
        """What `draw` gives for a step; steps have to rise by one from the first that is asked for."""
        if self._pool is None:
            return self._draw(step)
        following = self._waiting[-1][0] + 1 if self._waiting else step
        for later in range(following, step + 4 * self._processes + 1):
            self._waiting.append((later, self._pool.submit(_drawn, later)))
        asked, drawn = self._waiting.popleft()
        if asked != step:
            raise ValueError(f"expected step {asked}, the next of those drawn ahead, got {step}")
        return drawn.result()


_draws: list[Callable[[int], Any]] = []
"""The one of a drawing process."""


def _remember(draw: Callable[[int], Any]) -> None:
    _draws.append(draw)


def _drawn(step: int) -> Any:
    return _draws[0](step)
