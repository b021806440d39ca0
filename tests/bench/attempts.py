"""Measures one after the other: one that fails or takes too long costs no other its figures."""

import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from stamps import Figures


class TookTooLong(Exception):
    """A measure ran into its limit."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Within this context, of the main thread, raise TookTooLong after so many seconds."""

    def over(signum: int, frame: Any) -> None:
        raise TookTooLong(f"it took longer than {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, over)
    others = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *others)  # a test's


class Attempts:
    """Tries measures within so many seconds in all. `errors` counts what ended otherwise than by memory or time."""

    def __init__(self, seconds: float) -> None:
        self.errors = 0
        self._until = time.monotonic() + seconds

    def __call__(self, measure: Callable[[], Figures], seconds: float) -> Figures:
        """The figures of a measure that may take so many seconds, or why there are none."""
        left = self._until - time.monotonic()
        if left <= 0:
            return {"not_measured": "the time of the whole run was over; name fewer sizes, or give more --seconds"}
        # Only words are kept of an error: its frames would hold the memory of what failed.
        try:
            with at_most(min(seconds, left)):
                return measure()
        except torch.OutOfMemoryError as error:
            return {"not_measured": f"out of memory: {_first_line(error)}"}
        except TookTooLong as error:
            return {"not_measured": str(error)}
        except Exception as error:  # noqa: BLE001 - other measures are worth their figures all the same
            traceback.print_exc(file=sys.stderr)
            self.errors += 1
            return {"not_measured": f"{type(error).__name__}: {_first_line(error)}"}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
