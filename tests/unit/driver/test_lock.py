"""One command at a time in a folder, and nobody held up by one that was killed."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dreambooth.errors import InputError
from pipelines.driver import lock
from pipelines.driver.lock import locked

HOLDS = """
import sys, time
from pipelines.driver.lock import locked
with locked(sys.argv[1], say=print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.02)


def leave(folder: Path, **changes: Any) -> None:
    """Leave a lock as a killed command does, with what is different about it."""
    with locked(str(folder), say=print):
        left = json.loads((folder / "lock.json").read_text())
    (folder / "lock.json").write_text(json.dumps(left | changes))


def test_a_second_command_is_refused_and_the_next_is_not(tmp_path: Path) -> None:
    with locked(str(tmp_path / "rex"), say=print) as confirm:
        confirm()
        at_work = rf"another command is at work in {tmp_path}/rex: process \d+ on .+, since"
        with pytest.raises(InputError, match=at_work), locked(str(tmp_path / "rex"), say=print):
            pass
        with locked(str(tmp_path / "mia"), say=print) as confirm_another:
            confirm_another()
        confirm()
    assert list((tmp_path / "rex").iterdir()) == []
    with locked(str(tmp_path / "rex"), say=print) as confirm:
        confirm()


def test_a_killed_command_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {holder.pid} on"), locked(str(tmp_path), say=print):
        pass
    holder.kill()
    holder.communicate()
    began = time.monotonic()
    with locked(str(tmp_path), say=pytest.fail) as confirm:
        confirm()
    assert time.monotonic() - began < 1.0


def test_a_later_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    leave(tmp_path, created=psutil.Process().create_time() - 60)
    with locked(str(tmp_path), say=pytest.fail) as confirm:
        confirm()


class TestAnotherMachine:
    """Whose processes can't be looked at: its lock is watched."""

    def test_one_at_work_writes_its_lock_anew(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        said: list[str] = []
        with locked(str(tmp_path), say=print):
            monkeypatch.setattr(lock, "_machine", lambda: "elsewhere")
            with pytest.raises(InputError, match="another command is at work"), locked(str(tmp_path), say=said.append):
                pass
        [line] = said
        assert "may still be at work" in line

    def test_one_that_is_lost_is_waited_for_and_then_replaced(self, tmp_path: Path) -> None:
        leave(tmp_path, machine="elsewhere")
        said: list[str] = []
        began = time.monotonic()
        with locked(str(tmp_path), say=said.append) as confirm:
            confirm()
        assert 1.0 < time.monotonic() - began < 3.0
        assert len(said) == 1

    def test_one_that_ends_meanwhile_is_not_waited_for(self, tmp_path: Path) -> None:
        leave(tmp_path, machine="elsewhere")
        with locked(str(tmp_path), say=lambda line: (tmp_path / "lock.json").unlink()) as confirm:
            confirm()


def test_of_two_that_start_at_once_one_is_refused(tmp_path: Path) -> None:
    with locked(str(tmp_path), say=print) as confirm:
        path = tmp_path / "lock.json"  # written between this one's look and its own lock
        path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "another's"}))
        time.sleep(0.3)
        with pytest.raises(InputError, match="another command is at work"):
            confirm()
    assert json.loads((tmp_path / "lock.json").read_text())["token"] == "another's"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"of": "a later version"}'])
def test_a_file_that_says_nothing_of_use_holds_nobody_up(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock.json").write_text(content)
    with locked(str(tmp_path), say=pytest.fail) as confirm:
        confirm()
