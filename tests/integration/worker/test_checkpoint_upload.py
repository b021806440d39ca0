"""Checkpoints on their way to a store: a process that is killed meanwhile goes on from the one before."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.integration.conftest import forget_open_stores
from tests.integration.faulty_store import faulty_proxy

UNIT = Path(__file__).parents[2] / "unit" / "worker"
TRAINING = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_stored_checkpoints as tests
from pipelines.storage.streams import Stream
from pipelines.worker.checkpoints import StoredCheckpoints
write = Stream.write
def halfway(self, content):
    written = write(self, content)
    if "/step-00000004-" in self._file.path and self.record.size > 10_000:
        print("halfway", flush=True)
        threading.Event().wait()
    return written
if "halfway" in sys.argv:
    Stream.write = halfway
class OneByOne(StoredCheckpoints):
    def begin(self, engine, history):
        writing = super().begin(engine, history)
        if history.step < 4:
            writing.wait()
        return writing
tests.Training.kind = OneByOne
tuned = tests.Training(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]).run()
print("resumed from", tuned.record["resumed_from"], "loss", tuned.record["history"][-1]["loss"].hex())
"""


class Line:
    """The line to a store: the first upload that belongs to step 4 stays on it."""

    def __init__(self) -> None:
        self.last, self.held = "", threading.Event()
        self.holds = True

    def seen(self, call: str) -> None:
        self.last = call

    def fate(self) -> str:
        if self.holds and self.last.startswith("PUT ") and "/step-00000004-" in self.last:
            self.held.set()
            return "silent"
        return "passes"


@pytest.fixture
def line(object_store: Any, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    line = Line()
    upstream = urlsplit(object_store.environment["AWS_ENDPOINT_URL_S3"]).netloc
    with faulty_proxy(upstream, line.fate, seen=line.seen) as address:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, address)
        forget_open_stores()
        yield line


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tiny_pipeline: Path, instance_folder: Path) -> Start:
    def started(uri: str, *stops: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", TRAINING, str(UNIT), str(tiny_pipeline), str(instance_folder), uri, *stops]
        here = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.Popen(command, env=here, stdout=subprocess.PIPE, text=True)

    return started


def assert_goes_on(start: Start, uri: str, tmp_path: Path) -> None:
    with start(uri) as again, start(f"{tmp_path}/calm") as calm:
        (resumed, _), (whole, _) = again.communicate(), calm.communicate()
    assert resumed.startswith("resumed from 2 ")
    assert resumed.split("loss")[1] == whole.split("loss")[1]


@pytest.mark.timeout(600)
def test_killed_during_an_upload_it_goes_on_from_the_checkpoint_before(
    line: Line, s3: str, start: Start, tmp_path: Path
) -> None:
    uri = f"{s3}/checkpoints"
    with start(uri) as struck:
        assert line.held.wait(300)
        struck.send_signal(signal.SIGKILL)
        struck.communicate()
    line.holds = False
    assert_goes_on(start, uri, tmp_path)


@pytest.mark.timeout(600)
def test_killed_halfway_through_a_file_it_goes_on_from_the_checkpoint_before(start: Start, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/checkpoints"
    with start(uri, "halfway") as struck:
        assert struck.stdout is not None
        assert struck.stdout.readline() == "halfway\n"
        struck.send_signal(signal.SIGKILL)
        struck.communicate()
    [folder] = (tmp_path / "checkpoints").glob("step-00000004-*")
    assert [path.name for path in folder.iterdir()] == ["engine.pt"]  # and no manifest
    assert_goes_on(start, uri, tmp_path)
