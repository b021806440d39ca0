"""The command line, expected to refuse."""

import os
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from click.testing import CliRunner
from refusing import CPUS, Refused

from pipelines.cli import main


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


@pytest.fixture
def refused(
    tiny_pipeline: Path,
    instance_folder: Path,
    mlflow_database: str,
    output: Path,
    working_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Refused:
    """What the command line says to `dreambooth run` with sound arguments but those given."""
    import pipelines.driver.personalize

    def start(*arguments: object, **options: object) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(CPUS)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(pipelines.driver.personalize, "ray_cluster", start)
    monkeypatch.setattr(pipelines.driver.personalize, "ray_cluster_meanwhile", lambda config: nullcontext(start))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_database)

    def invoke(*arguments: str | Path, images: str | Path = instance_folder) -> str:
        sound = ("--images", images, "--class-noun", "dog", "--base-model", tiny_pipeline)
        sound += ("--set", f"storage.root={output}")
        before = sorted(working_folder.rglob("*"))
        messages = []
        for dry_run in ([], ["--dry-run"]):
            result = CliRunner().invoke(main, ["run", *map(str, (*sound, *arguments)), *dry_run])
            assert result.exit_code == 2, (result.output, result.exception)
            assert result.stdout == ""
            assert "Traceback" not in result.stderr
            messages.append(re.sub(r"\.probe-[0-9a-f]+(\.[0-9a-f]+\.part)?", ".probe", result.stderr.strip()))
        assert messages[0] == messages[1]
        written = output.rglob("*") if output.is_dir() else ()
        assert [path for path in written if path.is_file()] == []
        assert sorted(working_folder.rglob("*")) == before
        return messages[0].removeprefix("error: ")

    return invoke
