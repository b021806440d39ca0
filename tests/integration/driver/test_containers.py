"""Runs where a container leaves little: no home, no user's name, hardly any shared memory, no network but the loopback.

Namespaces of the kernel stand in for containers, so root is needed; elsewhere these tests are skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., "subprocess.CompletedProcess[str]"]

NO_NAME = "unshare --user --map-user=4242 --map-group=4242 env -u HOME -u LOGNAME -u USER -u LNAME -u USERNAME"
"""As `docker run --user 4242` of an image without that user."""
ALONE = "ip link set lo up; mount -t tmpfs -o size=64m tmpfs /dev/shm;"
"""No interface but the loopback, and the shared memory that Docker gives."""
BAREST = f'{ALONE} exec {NO_NAME} "$@"'
READ_ONLY = 'ip link set lo up; mount -t tmpfs -o ro tmpfs "$HOME"; cd "$HOME"; exec "$@"'
"""A home that can only be read, and is the working folder, too."""


@pytest.fixture
def contained(tmp_path: Path) -> Command:
    """Run `dreambooth` after a shell's words, in namespaces of its own."""
    unshare = shutil.which("unshare")
    if (
        unshare is None
        or subprocess.run([unshare, "-n", "-m", "ip", "link"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this user may not make namespaces")
    (tmp_path / "home").mkdir()

    def run(shell: str, *arguments: str | Path, **variables: str) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
        surroundings = {**os.environ, "HOME": str(tmp_path / "home"), **variables}
        surroundings.pop("DREAMBOOTH_CACHE", None)
        return subprocess.run(
            [unshare, "-n", "-m", "sh", "-c", shell, "sh", *words],
            env=surroundings,
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )

    return run


@pytest.fixture
def arguments(tiny_pipeline: Path, instance_folder: Path) -> list[str]:
    """Command of a run of two steps, with everything that it writes where it is written by default."""
    settings = {
        "prior.num_class_images": 2,
        "prior.num_inference_steps": 2,
        "evaluation.num_inference_steps": 2,
        "evaluation.images_per_prompt": 1,
    }
    flags = ["--class-noun", "dog", "--base-model", str(tiny_pipeline), "--steps", "2"]
    return ["run", "--images", str(instance_folder), *flags, *as_sets(settings)]


@pytest.fixture
def places(tracking_in: Callable[[Path], str], tmp_path: Path) -> list[str]:
    """Other places for what is written, that can be."""
    return as_sets({"storage.root": tmp_path / "output", "tracking.uri": tracking_in(tmp_path)})


def as_sets(settings: dict[str, object]) -> list[str]:
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def long_folder(tmp_path: Path) -> str:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    return str(folder)


def said_in_words(done: "subprocess.CompletedProcess[str]") -> str:
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr


def test_a_dry_run_with_next_to_nothing(
    contained: Command, arguments: list[str], places: list[str], tmp_path: Path
) -> None:
    done = contained(BAREST, *arguments, *places, "--dry-run", TMPDIR=long_folder(tmp_path))
    assert done.returncode == 0, done.stderr
    said_in_words(done)


def test_a_dry_run_where_nothing_can_be_written(contained: Command, arguments: list[str], places: list[str]) -> None:
    """Results go to the working folder by default: a sentence, and a sound run where other places are named."""
    done = contained(READ_ONLY, *arguments, "--dry-run", TMPDIR="/nonexistent")
    assert done.returncode == 2, done.stderr
    assert "it is on a read-only file system; name another folder" in said_in_words(done)
    done = contained(READ_ONLY, *arguments, *places, "--dry-run", TMPDIR="/nonexistent")
    assert done.returncode == 0, done.stderr


def test_not_even_a_loopback_is_a_sentence_and_the_doctors_too(
    contained: Command, arguments: list[str], places: list[str]
) -> None:
    for command, code in (([*arguments, *places], 2), (["doctor"], 1)):
        done = contained('exec "$@"', *command)
        assert done.returncode == code, done.stderr
        assert "ip link set lo up" in " ".join((done.stdout + said_in_words(done)).split())


@pytest.mark.recovery
@pytest.mark.parametrize(("shell", "folder"), [(BAREST, "long"), (READ_ONLY, "/nonexistent/deeper")])
def test_a_run(
    shell: str, folder: str, contained: Command, arguments: list[str], places: list[str], tmp_path: Path
) -> None:
    done = contained(shell, *arguments, *places, TMPDIR=long_folder(tmp_path) if folder == "long" else folder)
    assert done.returncode == 0, done.stderr
    said_in_words(done)
    assert json.loads((tmp_path / "output" / "red-dog" / "summary.json").read_text())["version"] == 1


@pytest.mark.recovery
def test_the_doctor_names_all_of_it(contained: Command, places: list[str], tmp_path: Path) -> None:
    done = contained(BAREST, "doctor", *places, TMPDIR=long_folder(tmp_path), COLUMNS="1000")
    said = done.stdout + said_in_words(done)
    for words in ("has no entry in passwd", "does for one", "bytes long", "/dev/shm has 6", "warning"):
        assert words in said, said
