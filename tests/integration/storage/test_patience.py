"""One process waits once for a store that is away, then it is answered at once; and goes on when the store is back."""

import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from pipelines.queue.subject_queue import QueuedSubject, SubjectQueue
from pipelines.storage import files, patient_s3
from pipelines.storage.faults import StoreAway
from pipelines.tasks import SubjectRecord
from tests.integration.conftest import forget_open_stores
from tests.integration.faulty_store import faulty_proxy


class Store:
    """A proxy before the store; `becomes` is what becomes of calls."""

    becomes = "passes"

    def fate(self) -> str:
        return self.becomes


@pytest.fixture
def store(object_store: Any, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store()
    monkeypatch.setattr(patient_s3, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(patient_s3, "_ANSWER_SECONDS", 1)
    monkeypatch.setattr(patient_s3, "_LOOK_AGAIN_SECONDS", 0.5)
    with faulty_proxy(urlsplit(object_store.environment["AWS_ENDPOINT_URL_S3"]).netloc, store.fate) as address:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, address)
        forget_open_stores()
        yield store
    forget_open_stores()


@pytest.mark.parametrize("fate", ["gone", "503", "silent"])
def test_a_process_waits_once_for_its_store(fate: str, store: Store, s3: str) -> None:
    files.write_json(f"{s3}/there.json", 1)
    store.becomes = fate
    spent = []
    for call in (
        lambda: files.write_json(f"{s3}/record.json", 2),
        lambda: files.exists(f"{s3}/there.json"),
        lambda: files.read_json(f"{s3}/there.json"),
        lambda: files.filesystem(s3)[0].ls(files.filesystem(s3)[1]),
        lambda: files.write_json(f"{s3}/record.json", 2),
    ):
        began = time.monotonic()
        with pytest.raises(
            StoreAway, match=r"^s3://dreambooth at http://127\.0\.0\.1:\d+ has been away .*same command"
        ):
            call()
        spent.append(time.monotonic() - began)
    assert 2.0 <= spent[0] < 8.0, spent
    assert sum(spent[1:]) < 6.0, spent
    store.becomes = "passes"
    time.sleep(0.6)
    files.write_json(f"{s3}/record.json", 3)
    assert files.read_json(f"{s3}/record.json") == 3


def test_a_queue_whose_store_is_away_hands_out_nothing_and_counts_no_failure(store: Store, s3: str) -> None:
    record = SubjectRecord(name="rex", key="k", class_noun="dog", identifier="tfz")
    task: Any = type("Task", (), {"protocol": None})()
    subjects = [QueuedSubject(record=record, task=task, prior=None)]
    queue = SubjectQueue(s3, "first", subjects, retries=1)
    assert queue.next("first/0") is not None
    store.becomes = "gone"
    with pytest.raises(StoreAway):
        queue.failed("rex", "its worker died")
    assert queue.next("first/0", fresh=True) is None
    halted = queue.snapshot().halted
    assert halted is not None
    assert "s3://dreambooth" in halted
    store.becomes = "passes"
    time.sleep(0.6)
    again = SubjectQueue(s3, "second", subjects, retries=1)
    [found] = again.records()
    assert (found.state, found.attempts, found.failures) == ("waiting", 1, 0)
