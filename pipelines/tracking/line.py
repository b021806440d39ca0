"""Calls to MLflow in the background: work never waits for them, and its end waits only for seconds.

A process has one line of calls, and one thread that makes them, in order and one at a time. Most are posted: nobody
waits for them. The first in the line is tried again, with growing pauses, until MLflow takes it; then the rest follows.
Who needs an answer waits for it, until nothing has got through for twenty seconds: so all callers share one patience,
and once it has run out the next one waits for a single attempt only.

    line = Line(explain=str)
    line.post(lambda: client.log_batch(run_id, metrics=points), owner=run)
    version = line.wait(line.post(lambda: client.create_model_version(name, source)))  # raises Away
"""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from dreambooth.errors import InputError
from pipelines.cluster.environment import environment

_T = TypeVar("_T")
_REQUEST_SECONDS = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_DEFAULT_REQUEST_SECONDS = 10
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0
_QUICK_RETRIES = 2
_MISTAKES = (InputError, ValueError, TypeError, LookupError, AssertionError)


def request_seconds() -> int:
    """How long one HTTP request may take; MLflow's own variable, 10 where it isn't set (MLflow's default is 120)."""
    return int(os.environ.get(_REQUEST_SECONDS) or _DEFAULT_REQUEST_SECONDS)


def patience() -> float:
    """Seconds that callers wait while nothing gets through."""
    return 2.0 * request_seconds()


class Away(Exception):
    """MLflow is unreachable, refuses the credentials, or is too slow. Nothing is lost: retry later."""


@dataclass(eq=False)
class Call(Generic[_T]):
    """An operation in the line. `extra` are seconds that it may take above others; `owner` whose it is.

    `alive` proves that MLflow answers: an operation that keeps failing although it does is given up. One of `once` is
    not tried again.
    """

    operation: Callable[[], _T]
    owner: object = None
    extra: float = 0.0
    alive: Callable[[], object] | None = None
    once: bool = False
    suspected: bool = False
    future: "Future[_T]" = field(default_factory=Future)


class Line:
    """The calls of a process; `explain` says in a line what an exception means.

    `say` is called when MLflow has been away for a while, and when it answers again.
    """

    def __init__(self, explain: Callable[[Exception], str]) -> None:
        self._explain = explain
        self.say: Callable[[str], None] | None = None
        self._calls: deque[Call[Any]] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._since: float | None = None  # when the first attempt was begun since which none has got through
        self._attempt: float | None = None  # when the one in flight was begun
        self._pause = _FIRST_PAUSE
        self._failures, self._reason = 0, ""
        self._hurry = self._said = False
        threading.Thread(target=self._work, name="mlflow", daemon=True).start()

    def post(
        self,
        operation: Callable[[], _T],
        *,
        owner: object = None,
        extra: float = 0.0,
        alive: Callable[[], object] | None = None,
        once: bool = False,
    ) -> Call[_T]:
        """Put an operation at the end of the line; see `Call`."""
        call = Call(operation, owner, extra, alive, once)
        with self._changed:
            self._calls.append(call)
            self._changed.notify_all()
        return call

    def wait(self, call: Call[_T]) -> _T:
        """A posted operation's result, or what it raised; raises Away, and takes it out, when there is no hope."""
        arrived, failures = time.monotonic(), self._failures
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            longest = 3 * patience() + sum(one.extra for one in self._calls)
            while not call.future.done():
                if (reason := self._hopeless(call, arrived + longest, failures)) is not None:
                    self._take_out([call])
                    raise Away(reason)
                self._changed.wait(0.1)
        return call.future.result()

    def discard(self, owner: object) -> int:
        """Take out what waits of an owner; returns how many calls that were."""
        with self._changed:
            calls = [call for call in self._calls if call.owner is owner]
            self._take_out(calls)
        return len(calls)

    def waiting(self, owner: object) -> int:
        """How many calls of an owner are in the line."""
        with self._changed:
            return sum(call.owner is owner for call in self._calls)

    @property
    def hangs(self) -> bool:
        """Whether the call in flight has been there for so long that it may never come back."""
        with self._changed:
            first = self._calls[0].extra if self._calls else 0.0
            return self._attempt is not None and time.monotonic() - self._attempt > patience() + first

    def _hopeless(self, call: Call[Any], deadline: float, failures: int) -> str | None:
        now, allowed = time.monotonic(), patience()
        first = self._calls[0] if self._calls else call
        hangs = self._attempt is not None and now - self._attempt > allowed + first.extra
        if (
            self._since is not None
            and now - self._since > allowed + first.extra
            and (hangs or self._failures > failures)
        ):
            return self._reason or f"it takes the connection, but has not answered for {allowed:.0f} s"
        if now > deadline:
            return f"it answers too slowly; set {_REQUEST_SECONDS} (now {request_seconds()}) to wait longer"
        return None

    def _take_out(self, calls: list[Call[Any]]) -> None:
        gone = set(map(id, calls))
        self._calls = deque(call for call in self._calls if id(call) not in gone)
        if not self._calls:
            self._since = None
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._calls))
                call, self._attempt = self._calls[0], time.monotonic()
                self._since = self._since or self._attempt
            self._try(call)

    def _try(self, call: Call[Any]) -> None:
        try:
            with environment(_limits(0 if call.once else _QUICK_RETRIES)):
                result = call.operation()
        except Exception as error:  # noqa: BLE001 - MLflow's, SQLAlchemy's, the database driver's, an object store's
            self._failed(call, error, final=call.once or is_refusal(error) or self._is_its_own(call))
        else:
            self._through(call, lambda: call.future.set_result(result))

    def _is_its_own(self, call: Call[Any]) -> bool:
        """Whether a call that has failed for long fails although MLflow answers."""
        if call.alive is None or self._since is None or time.monotonic() - self._since < patience() / 2 + call.extra:
            return False  # before those who wait lose theirs
        suspected, call.suspected = call.suspected, False
        with contextlib.suppress(Exception):
            call.alive()
            call.suspected = True  # it may have come back just now
        return suspected and call.suspected

    def _failed(self, call: Call[Any], error: Exception, *, final: bool) -> None:
        if final:
            self._through(call, lambda: call.future.set_exception(error), answered=not call.once)
            return
        with self._changed:
            self._attempt = None
            self._failures, self._reason = self._failures + 1, self._explain(error)
            self._changed.notify_all()
            long = self._since is not None and time.monotonic() - self._since > patience()
            say = self.say if long and not self._said else None
            self._said = self._said or long
        if say is not None:
            say(f"MLflow is away ({self._reason}); work continues, and missing data is sent when it answers again")
        with self._changed:
            self._changed.wait_for(lambda: self._hurry or call.suspected, timeout=self._pause)
            self._hurry, self._pause = False, min(2 * self._pause, _LONGEST_PAUSE)

    def _through(self, call: Call[Any], settle: Callable[[], None], *, answered: bool = True) -> None:
        with self._changed:
            if call in self._calls:
                self._calls.remove(call)
                settle()
            self._attempt = None
            say = self.say if answered and self._said else None
            if answered or not self._calls:
                self._since, self._reason, self._pause, self._said = None, "", _FIRST_PAUSE, False
            self._changed.notify_all()
        if say is not None:
            say("MLflow answers again")


@contextlib.contextmanager
def not_twice() -> Iterator[None]:
    """Send each request once within this context: a retry after a lost answer would duplicate it."""
    with environment(_limits(0)):
        yield


def _limits(retries: int) -> dict[str, str]:
    """MLflow's own limits, per request; its defaults are seven retries of 120 seconds, later as the server asks."""
    return {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
        _REQUEST_SECONDS: str(request_seconds()),
    }


def is_refusal(error: Exception) -> bool:
    """Whether MLflow answered, and the answer will be the same next time: a 4xx that is not about time or rights."""
    status = getattr(error, "get_http_status_code", None)  # of MlflowException
    if status is None:
        return isinstance(error, _MISTAKES)
    return 400 <= status() < 500 and status() not in (401, 403, 408, 429)


def chunks(groups: list[list[_T]], size: int) -> list[list[_T]]:
    """Join groups to lists of `size` or a few more, without cutting one in two."""
    joined: list[list[_T]] = []
    for group in groups:
        if not joined or len(joined[-1]) >= size:
            joined.append([])
        joined[-1].extend(group)
    return joined
