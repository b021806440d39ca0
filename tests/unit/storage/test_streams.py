"""A file that is streamed to an address: hashed as it goes, never trusted when it was cut short."""

import hashlib
import os
from pathlib import Path

import pytest

from pipelines.storage.files import read_bytes
from pipelines.storage.streams import streamed

CONTENT = bytes(range(256)) * 40_000  # 10 MB: three pieces


@pytest.mark.parametrize("place", ["{tmp_path}/a/b/file", "memory://streams/a/b/file"])
def test_what_arrives_is_what_was_written(place: str, tmp_path: Path) -> None:
    uri = place.format(tmp_path=tmp_path)
    with streamed(uri) as stream:
        assert stream.write(CONTENT[:10]) == 10
        assert stream.write(memoryview(CONTENT)[10:]) == len(CONTENT) - 10
        stream.write(b"")
        stream.flush()
    assert read_bytes(uri) == CONTENT
    assert stream.record.size == len(CONTENT)
    assert stream.record.sha256 == hashlib.sha256(CONTENT).hexdigest()


def test_an_error_goes_through_and_closes_the_file(tmp_path: Path) -> None:
    kept = []

    def fail() -> None:
        with streamed(f"{tmp_path}/file") as stream:
            kept.append(stream)
            stream.write(b"some")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(ValueError, match="closed file"):
        kept[0].write(b"more")


def test_bytes_that_do_not_arrive_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def lose_some() -> None:
        with streamed(str(path)) as stream:
            stream.write(b"some")
            stream._file.flush()
            os.truncate(path, 2)

    with pytest.raises(OSError, match=r"4 bytes were written, but 2 arrived at .*file"):
        lose_some()
