"""An empty folder: commands that only look leave it empty, and many at once make one database of it."""

import errno
import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from dreambooth.config.settings import TrackingConfig
from dreambooth.errors import InputError
from dreambooth.miniature import subject_dir
from pipelines.cli import main
from pipelines.tracking import database as mlflow_database
from pipelines.tracking.client import check_connection, connect, quietly
from pipelines.tracking.runs import check_tracking, track

CHECKOUT = Path(__file__).parents[3]
USE = """
from dreambooth.config.settings import TrackingConfig
from pipelines.tracking.runs import check_tracking, track
config = TrackingConfig()
check_tracking(config)
with track(config, run_name="rex", params={"steps": 1}) as run:
    run.log_metrics({"loss": 0.5}, step=1)
    error = run.end("FINISHED")
    assert error is None, error
"""


def contents(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def together(commands: list[list[str]], folder: Path) -> list[tuple[int, str]]:
    """Start processes at once in a folder; their exit codes, and what they said."""
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    started = [
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in commands
    ]
    said = [process.communicate(timeout=500)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_several_processes_at_once_make_one_database(working_folder: Path) -> None:
    ended = together([[sys.executable, "-c", USE]] * 4, working_folder)
    assert ended == [(0, "")] * 4
    assert [name for name in contents(working_folder) if not name.startswith("mlruns")] == ["mlflow.db"]
    with quietly():
        client = check_connection(check_tracking(TrackingConfig()))
        experiments = {one.name: one.experiment_id for one in client.search_experiments()}
        assert set(experiments) == {"Default", "dreambooth"}
        runs = client.search_runs([experiments["dreambooth"]])
        assert [(run.info.status, run.data.metrics) for run in runs] == [("FINISHED", {"loss": 0.5})] * 4


def test_dry_runs_at_once_leave_nothing(working_folder: Path) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "run", "--images", str(subject_dir("coral-car")), "--dry-run"]
    ended = together([command] * 3, working_folder)
    assert [code for code, _ in ended] == [0, 0, 0], ended
    assert contents(working_folder) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--images", str(subject_dir("coral-car")), "--dry-run"],
        ["run", "--images", str(subject_dir("coral-car")), "--output", "a/b/c", "--dry-run"],
        ["batch", "pets.yaml", "--dry-run"],
        ["paper", "--quick", "--dry-run"],
        ["gc", "--dry-run"],
        ["models"],
        ["settings"],
        ["settings", "--markdown"],
        ["identifiers"],
        ["manifest", "rayjob", "pets.yaml", "--image", "registry/dreambooth:1", "--set", "cluster.lanes=1"],
        ["doctor"],
        ["--help"],
    ],
    ids=" ".join,
)
def test_commands_that_only_look_make_nothing(arguments: list[str], working_folder: Path) -> None:
    rows = [f"{{name: {name}, class_noun: {name.split('-')[1]}}}" for name in ("coral-car", "navy-dog")]
    subjects = [row[:-1] + f", instance_images: {subject_dir(row[7:].split(',')[0])}}}" for row in rows]
    (working_folder / "pets.yaml").write_text(f"subjects: [{', '.join(subjects)}]\n")
    result = CliRunner().invoke(main, arguments)
    refused = arguments[0] in ("gc", "manifest")  # no output folder to look in; a local one, which pods don't see
    assert result.exit_code == (2 if refused else 0), result.output
    assert contents(working_folder) == ["pets.yaml"]
    if arguments == ["models"]:
        assert "no model is registered here yet" in result.output


def test_a_model_that_cannot_be_registered_anywhere_yet(working_folder: Path) -> None:
    result = CliRunner().invoke(main, ["generate", "a [V] dog", "--model", "models:/dreambooth-rex@latest"])
    assert result.exit_code == 2
    assert "no model is registered here yet: there is no" in result.output
    assert contents(working_folder) == []


def _half(path: Path) -> None:
    with sqlite3.connect(path) as opened:
        opened.execute("CREATE TABLE experiments (experiment_id INTEGER)")
        opened.execute("CREATE TABLE alembic_version (version_num TEXT)")
        opened.execute("CREATE TABLE _alembic_tmp_metrics (step INTEGER)")
    opened.close()


@pytest.mark.parametrize("make", [_half, Path.touch], ids=["half made", "empty"])
def test_a_database_that_was_left_half_made_is_named(make: "type[Path]", working_folder: Path) -> None:
    path = working_folder / "mlflow.db"
    make(path)
    with pytest.raises(InputError, match=rf"move it away \(mv {path} {path}.half\)"):
        check_tracking(TrackingConfig())
    path.rename(f"{path}.half")
    with track(TrackingConfig(), run_name="rex") as run:
        assert run.run_id


def test_a_database_that_others_hold_is_named_and_not_waited_for(working_folder: Path) -> None:
    path = working_folder / "mlflow.db"
    connect(f"sqlite:///{path}")
    holder = sqlite3.connect(path)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(InputError, match=r"database is locked.*can't lock files.*a local disk"):
            check_tracking(TrackingConfig())
    finally:
        holder.close()
    assert check_tracking(TrackingConfig()) == f"sqlite:///{path}"


def test_where_files_cannot_be_linked(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    made = mlflow_database._migrate

    def slowly(path: Path, *, artifacts: Path) -> None:
        path.write_bytes(template.read_bytes())

    template = working_folder / "template"
    made(template, artifacts=working_folder / "mlruns")
    monkeypatch.setattr(mlflow_database, "_migrate", slowly)
    database = working_folder / "mlflow.db"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(mlflow_database.make_database, [database] * 8))
    assert database.read_bytes() == template.read_bytes()
    assert contents(working_folder) == ["mlflow.db", "template"]
    mlflow_database.check_database(database)
