"""Give work back before a worker is preempted or terminated: in training, with a checkpoint.

A node's operator drains it (`ray drain-node`) before taking it away. Ray Train notices, warns the workers, and moves
them later. A single worker gets SIGTERM and exits by itself.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pipelines.cluster.logs import log

WATCHER_SWITCH = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_ASK_EVERY = 10
"""Steps between checks for preemption: each is a barrier, and notice is given minutes ahead."""

_working, _terminated = threading.Event(), threading.Event()


def answer_sigterm() -> None:
    """Handle SIGTERM in a worker's main thread: exit at once, or, while there is work, after giving it back."""
    before = signal.getsignal(signal.SIGTERM)

    def answer(number: int, frame: FrameType | None) -> None:
        if _working.is_set() and not _terminated.is_set():
            _terminated.set()
        elif callable(before):
            before(number, frame)
        else:
            sys.exit(128 + number)

    signal.signal(signal.SIGTERM, answer)


def answering_workers() -> Any:
    """A Ray Train callback that runs in every worker's main thread, the only one that can set signal handlers."""
    from ray.train.v2._internal.execution.callback import WorkerCallback

    class AnswerSigterm(WorkerCallback):
        def after_init_train_context(self) -> None:
            answer_sigterm()

    return AnswerSigterm()


def notice() -> Callable[[], bool] | None:
    """A collective that is True if a node of this worker group is being preempted; None if preemption isn't watched."""
    import ray.train

    if os.environ.get(WATCHER_SWITCH) == "0":
        return None
    return lambda: ray.train.get_preemption_info() is not None


def terminated() -> bool:
    """Whether this process got SIGTERM and has to leave."""
    return _terminated.is_set()


@contextmanager
def while_working(tell: Callable[[], None]) -> Iterator[None]:
    """Within this context, the first SIGTERM waits until the work is given back; `tell` is called at once, in a thread.

    The sender may not wait long enough, and SIGKILL gives nobody the time to tell.
    """

    def wait() -> None:
        _terminated.wait()
        tell()

    threading.Thread(target=wait, name="sigterm", daemon=True).start()
    _working.set()
    try:
        yield
    finally:
        _working.clear()


class Leaving:
    """Checks every few steps for preemption (reported once) and SIGTERM.

    `any_rank` is collective: True on every rank if its argument is True on any. `terminated`: a rank got SIGTERM.
    """

    def __init__(self, machine_goes: Callable[[], bool] | None, any_rank: Callable[[bool], bool]) -> None:
        self._machine_goes, self._any_rank = machine_goes, any_rank
        self.terminated = False

    def noticed(self, step: int) -> bool:
        """Whether to write a checkpoint before leaving. Collective: call on every rank at every step."""
        if step % _ASK_EVERY:
            return False
        self.terminated = self._any_rank(terminated())
        announced = self._machine_goes is not None and self._machine_goes()
        if announced:
            self._machine_goes = None
        if self.terminated or announced:
            log("leaving", step=step)
        return self.terminated or announced


def exit_if_terminated() -> None:
    """Exit this process if it got SIGTERM."""
    if terminated():
        os._exit(128 + signal.SIGTERM)
