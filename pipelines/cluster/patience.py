"""Wait for Ray's processes on a busy machine longer than the 30 seconds that Ray gives them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

START_SECONDS = 180.0
_RAYLET = "raylet"
_T = TypeVar("_T")


@contextmanager
def patient_start(seconds: float = START_SECONDS) -> Iterator[None]:
    """Within this context `ray.init` waits so long for its node, but no longer than its process lives.

    Ray (2.60) asks for the node until it is there or 30 seconds are over, which no setting changes. It takes an answer
    that comes later.
    """
    from ray._private import services

    once: Callable[..., Any] = services.get_node

    def get_node(*args: Any) -> Any:
        return patiently(lambda: once(*args), seconds=seconds, alive=_raylet_lives)

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = once


def patiently(ask: Callable[[], _T], *, seconds: float, alive: Callable[[], bool], pause: float = 0.2) -> _T:
    """What `ask` answers. It is asked again after a RuntimeError, which is raised after `seconds` or if not `alive`."""
    ends = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except RuntimeError:
            if time.monotonic() >= ends or not alive():
                raise
        time.sleep(pause)


def _raylet_lives() -> bool:
    import psutil

    for child in psutil.Process().children():
        try:
            if child.name() == _RAYLET and child.status() != psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            continue
    return False
