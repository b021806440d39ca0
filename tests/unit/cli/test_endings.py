"""However a command ends, a person sees a sentence: the unforeseen is thrown in each of them."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from pipelines.cli import main
from pipelines.cli.endings import FAILURE, INTERRUPTED, UNREAD
from pipelines.cluster.sentence import sentence

PASSWORD = "corr/ect#horse@battery"
REMOTE = "Traceback (most recent call last):\n  File 'x.py', line 1, in f\nKeyError: 'lane'"

WORK: dict[tuple[str, ...], tuple[list[str], str]] = {
    ("run",): (["--images", "x", "--class-noun", "dog"], "pipelines.driver.personalize.personalize"),
    ("batch",): (["x.yaml"], "pipelines.plan.subject_list.read_batch"),
    ("doctor",): ([], "dreambooth.config.settings.load_config"),
    ("evaluate",): (["--model", "m", "--instance-images", "x"], "pipelines.apps.evaluate_model.evaluate_model"),
    ("export",): (
        ["m", "--format", "diffusers", "--to", "x"],
        "pipelines.apps.export.exporting.export_whole",
    ),
    ("paper",): ([], "pipelines.apps.paper.paper.plan_paper"),
    ("serve",): (["--model", "models:/x@latest"], "pipelines.apps.serve.subjects.find_subjects"),
    ("submit",): (["run", "--set", "storage.root=s3://b/r"], "pipelines.driver.jobs.connect"),
    ("jobs", "list"): ([], "pipelines.driver.jobs.connect"),
    ("jobs", "logs"): (["job"], "pipelines.driver.jobs.connect"),
    ("jobs", "status"): (["job"], "pipelines.driver.jobs.connect"),
    ("jobs", "stop"): (["job"], "pipelines.driver.jobs.connect"),
    ("manifest",): (["rayjob", "x.yaml", "--image", "i"], "pipelines.storage.files.filesystem"),
    ("study",): (["a", "b"], "pipelines.apps.study.make.open_study"),
    ("generate",): (["a [V] dog", "--model", "m"], "pipelines.apps.generate.generate"),
    ("identifiers",): ([], "dreambooth.models.base_model.resolve_base_model"),
    ("gc",): ([], "pipelines.apps.garbage.find_leftovers"),
    ("models",): ([], "pipelines.tracking.model_list.list_models"),
    ("settings",): ([], "dreambooth.config.explain.list_settings"),
    ("version",): ([], "pipelines.plan.here.describe_here"),
    ("families",): (["--markdown"], "pipelines.cli.families_page.families_page"),
}
"""Arguments that every command takes, and where its work begins."""


def leaves(command: click.Command, *names: str) -> Iterator[tuple[str, ...]]:
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from leaves(below, *names, name)
    else:
        yield names


def test_no_command_is_forgotten() -> None:
    assert set(leaves(main)) == set(WORK)


@pytest.fixture(params=sorted(WORK), ids=" ".join)
def thrown_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Result]:
    """Run a command whose work raises an exception."""
    arguments, work = WORK[request.param]

    def invoke(error: BaseException) -> Result:
        def throw(*_: object, **__: object) -> Any:
            raise error

        monkeypatch.setattr(work, throw)
        return CliRunner().invoke(main, [*request.param, *arguments])

    return invoke


def test_the_unforeseen_ends_in_a_sentence_and_a_file(
    thrown_in: Callable[[BaseException], Result], working_folder: Path
) -> None:
    result = thrown_in(ZeroDivisionError(f"division\nat http://me:{PASSWORD}@host/x"))
    assert result.exit_code == FAILURE
    assert result.stdout == ""
    (details,) = working_folder.glob("dreambooth-error-*.log")
    assert result.stderr == f"failed: ZeroDivisionError: division; details: {details}\n"
    assert "Traceback (most recent call last)" in details.read_text()
    assert "at http://me:***@host/x" in details.read_text()
    assert PASSWORD not in details.read_text()
    assert details.stat().st_mode & 0o077 == 0


def test_an_interrupt_ends_in_a_line(thrown_in: Callable[[BaseException], Result], working_folder: Path) -> None:
    result = thrown_in(KeyboardInterrupt())
    assert (result.exit_code, result.stdout) == (INTERRUPTED, "")
    assert len(result.stderr.splitlines()) == 1
    assert "run the same command again" in result.stderr
    assert list(working_folder.iterdir()) == []


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("Unable to allocate 3 TiB")])
def test_want_of_memory(thrown_in: Callable[[BaseException], Result], error: MemoryError) -> None:
    result = thrown_in(error)
    assert result.exit_code == FAILURE
    assert result.stderr.startswith("failed: no memory is left for this")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError(), "ValueError"),
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError("no lane can work any more"), "no lane can work any more"),
        (RuntimeError(f"rex failed: worker errors:\n{REMOTE}"), "rex failed: worker errors: KeyError: 'lane'"),
        (RuntimeError(REMOTE), "KeyError: 'lane'"),
    ],
)
def test_what_is_said_of_an_exception(error: Exception, said: str) -> None:
    assert sentence(error) == said


def test_of_one_from_a_worker_what_was_raised_there() -> None:
    from ray.exceptions import RayTaskError

    cause = ValueError("no such lane")
    remote = RayTaskError("f", REMOTE, cause, proctitle="x", pid=1, ip="127.0.0.1")
    assert sentence(remote.as_instanceof_cause()) == sentence(remote) == "ValueError: no such lane"


def test_a_folder_that_takes_no_file_is_not_another_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    def throw(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("dreambooth.config.explain.list_settings", throw)
    monkeypatch.setattr(os, "open", full)
    result = CliRunner().invoke(main, ["settings"])
    assert (result.exit_code, result.stdout) == (FAILURE, "")
    assert result.stderr == "failed: ZeroDivisionError; the details can't be written to any folder here\n"


def test_what_libraries_log_and_threads_raise_has_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    def work(*_: object) -> list[Any]:
        try:
            raise ValueError("inner")
        except ValueError:
            logging.getLogger("some.library").exception("it went %s", "wrong")
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        raise KeyError("outer")

    monkeypatch.setattr("dreambooth.config.explain.list_settings", work)
    result = CliRunner().invoke(main, ["settings"])
    assert "Traceback" not in result.stderr
    assert "warning: a thread ended: ZeroDivisionError: division by zero" in result.stderr
    found = re.search(r"failed: KeyError: 'outer'; details: (\S+)\n", result.stderr)
    assert found is not None
    details = Path(found[1]).read_text()
    assert all(words in details for words in ("inner", "ZeroDivisionError", "outer"))


def test_clicks_own_errors_repeat_no_password() -> None:
    result = CliRunner().invoke(main, ["settings", f"http://me:{PASSWORD}@host"])
    assert result.exit_code == 2
    assert "http://me:***@host" in result.stderr
    assert PASSWORD not in result.stderr


class TestInAProcessOfItsOwn:
    @pytest.mark.parametrize("arguments", [["settings"], ["identifiers"], ["run", "--help"]])
    def test_nobody_reads_what_is_printed(self, arguments: list[str]) -> None:
        """As `dreambooth settings | head -0`: the reader is gone before the first line."""
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", *arguments], stdout=writer, stderr=subprocess.PIPE, check=False
        )
        os.close(writer)
        assert done.stderr == b""
        assert done.returncode in (UNREAD, 1 if "--help" in arguments else UNREAD)

    @pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
    def test_signals(self, signals: list[signal.Signals]) -> None:
        """In work that begins and never ends."""
        code = (
            "import dreambooth.config.explain, signal, time, pipelines.cli.main as cli\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background ignores it
            "def work(*_):\n    print('working', flush=True)\n    time.sleep(600)\n"
            "dreambooth.config.explain.list_settings = work\n"
            "cli.main(['settings'])"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "working\n"
            for each in signals:
                process.send_signal(each)
                time.sleep(0.02)
            said = process.communicate(timeout=30)[1]
        # A second one may come while the first is answered, or when Python has put its handlers away.
        assert process.returncode in (INTERRUPTED, *(-each for each in signals[1:]))
        assert len(said.splitlines()) <= 1
        assert "Traceback" not in said
