"""The line of calls to MLflow, with operations that fail, hang and come back as a server's do."""

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode

from pipelines.tracking import line as line_module
from pipelines.tracking.line import Away, Line, chunks, is_refusal, request_seconds

REQUEST = 0.25
PATIENCE = 2 * REQUEST
LATE = 3.0  # for what a busy machine adds


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may take a quarter of a second, and pauses are as much shorter: a fraction of MLflow's least."""
    monkeypatch.setattr(line_module, "request_seconds", lambda: REQUEST)
    monkeypatch.setattr(line_module, "_FIRST_PAUSE", REQUEST / 2)
    # MLflow reads whole seconds, whoever asks it next in this process.
    monkeypatch.setattr(line_module, "_limits", lambda retries: {})


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line(explain=str)
    yield line
    line.discard(None)


class Server:
    """Takes what it is given, while it is up."""

    def __init__(self) -> None:
        self.up, self.taken, self.tried = True, list[int](), list[float]()

    def take(self, value: int) -> Callable[[], int]:
        def operation() -> int:
            self.tried.append(time.monotonic())
            if not self.up:
                raise ConnectionError("nothing answers")
            self.taken.append(value)
            return value

        return operation


def until(holds: Callable[[], bool]) -> None:
    """Wait until a condition holds, by what the thread of the line does."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_request_may_take_as_long_as_mlflows_own_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert request_seconds() == 10
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    assert request_seconds() == 3


def test_what_is_posted_arrives_in_order_and_once(line: Line) -> None:
    server = Server()
    for value in range(100):
        line.post(server.take(value))
    assert line.wait(line.post(server.take(100))) == 100
    assert server.taken == list(range(101))


def test_posting_waits_for_nothing_and_all_is_sent_when_the_server_is_back(line: Line) -> None:
    server = Server()
    server.up = False
    began = time.monotonic()
    for value in range(20):
        line.post(server.take(value))
    assert time.monotonic() - began < 0.5
    until(lambda: len(server.tried) > 1)
    assert server.taken == []
    server.up = True
    assert line.wait(line.post(server.take(20))) == 20
    assert server.taken == list(range(21))


def test_all_callers_share_one_patience(line: Line) -> None:
    server = Server()
    server.up = False
    began = time.monotonic()
    with pytest.raises(Away, match="nothing answers"):
        line.wait(line.post(server.take(0)))
    line.post(server.take(1))
    assert PATIENCE <= time.monotonic() - began < 4 * PATIENCE + LATE
    time.sleep(1.25 * PATIENCE)
    began = time.monotonic()
    for value in range(20):
        with pytest.raises(Away):
            line.wait(line.post(server.take(value)))
    assert time.monotonic() - began < 4 * PATIENCE + LATE  # twenty would take as long each, without it 20 * PATIENCE


def test_each_pause_between_tries_is_twice_the_last(line: Line) -> None:
    server = Server()
    server.up = False
    line.post(server.take(0))
    until(lambda: len(server.tried) == 4)
    for pause, (one, following) in enumerate(pairwise(server.tried)):
        assert following - one >= 2**pause * REQUEST / 2


def test_a_call_that_never_ends_is_given_up(line: Line) -> None:
    never = threading.Event()
    began = time.monotonic()
    with pytest.raises(Away, match="has not answered for"):
        line.wait(line.post(never.wait))
    assert PATIENCE <= time.monotonic() - began < 4 * PATIENCE + LATE
    assert line.hangs
    never.set()
    assert line.wait(line.post(lambda: 1)) == 1


def test_a_server_that_always_answers_late_is_given_up(line: Line) -> None:
    for _ in range(20):
        line.post(lambda: time.sleep(0.9 * REQUEST))
    began = time.monotonic()
    with pytest.raises(Away, match=r"too slowly; set MLFLOW_HTTP_REQUEST_TIMEOUT \(now 0.25\)"):
        line.wait(line.post(lambda: None))
    assert 3 * PATIENCE <= time.monotonic() - began < 6 * PATIENCE + LATE


def test_a_long_upload_has_its_own_time(line: Line) -> None:
    assert line.wait(line.post(lambda: time.sleep(1.5 * PATIENCE) or "there", extra=2.5 * PATIENCE)) == "there"


def test_what_is_refused_is_not_tried_again_and_does_not_hold_up_the_rest(line: Line) -> None:
    server = Server()
    refused = line.post(lambda: int("x"))
    assert line.wait(line.post(server.take(1))) == 1
    with pytest.raises(ValueError, match="invalid literal"):
        line.wait(refused)


def test_what_fails_although_the_server_answers_is_given_up(line: Line) -> None:
    server = Server()
    broken = line.post(lambda: 1 / 0, alive=server.take(-1))
    assert line.wait(line.post(server.take(1))) == 1
    with pytest.raises(ZeroDivisionError):
        line.wait(broken)


def test_calls_of_one_owner_can_be_taken_out(line: Line) -> None:
    server, mine, others = Server(), object(), object()
    server.up = False
    for owner in (mine, others, mine):
        line.post(server.take(0), owner=owner)
    assert line.discard(mine) == 2
    assert (line.waiting(mine), line.waiting(others)) == (0, 1)
    line.discard(others)


def test_going_away_and_coming_back_are_said_once(line: Line) -> None:
    server, said = Server(), list[str]()
    line.say = said.append
    server.up = False
    line.post(server.take(0))
    until(lambda: bool(said))
    server.up = True
    line.wait(line.post(server.take(1)))
    assert [text.partition(" (")[0] for text in said] == ["MLflow is away", "MLflow answers again"]


@pytest.mark.parametrize(
    ("error", "refused"), [(ConnectionError("refused"), False), (TimeoutError(), False), (ValueError("a name"), True)]
)
def test_which_errors_are_refusals(error: Exception, refused: bool) -> None:
    assert is_refusal(error) is refused


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("RESOURCE_DOES_NOT_EXIST", True),
        ("INVALID_PARAMETER_VALUE", True),
        ("RESOURCE_ALREADY_EXISTS", True),
        ("TEMPORARILY_UNAVAILABLE", False),
        ("INTERNAL_ERROR", False),
        ("REQUEST_LIMIT_EXCEEDED", False),
        ("UNAUTHENTICATED", False),
        ("PERMISSION_DENIED", False),
    ],
)
def test_which_answers_of_mlflow_are_refusals(code: str, refused: bool) -> None:
    assert is_refusal(MlflowException("said", error_code=ErrorCode.Value(code))) is refused


def test_no_group_is_cut_in_two() -> None:
    assert chunks([[1, 2], [3], [4, 5, 6], [7]], 3) == [[1, 2, 3], [4, 5, 6], [7]]
    assert chunks([], 3) == []
