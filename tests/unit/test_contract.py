"""The contract of imports in pyproject.toml: it holds, and it fails when a lower room imports a higher one.

And what else holds for the code of both packages as text.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dreambooth

ROOT = Path(dreambooth.__file__).parents[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two packages' code, and the contract."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    for package in ("dreambooth", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return folder


def lint(checkout: Path) -> subprocess.CompletedProcess[str]:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        check=False,
        capture_output=True,
        text=True,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )


def test_imports_go_one_way(checkout: Path) -> None:
    done = lint(checkout)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ("pipelines/storage/publications.py", "pipelines.driver.batch"),
        ("pipelines/stages/evaluate_stage.py", "pipelines.worker.samplers"),
        ("pipelines/report/run_report.py", "pipelines.plan.run_plan"),
        ("dreambooth/config/settings.py", "dreambooth.models.base_model"),
        ("dreambooth/data/images/finding.py", "dreambooth.training.losses"),
        ("dreambooth/training/loop.py", "pipelines.tasks"),
        ("dreambooth/training/engine.py", "ray"),
        ("dreambooth/data/images/names.py", "dreambooth.data.images.finding"),  # which imports it: a circle
    ],
)
def test_an_import_the_other_way_is_found(checkout: Path, lower: str, higher: str) -> None:
    path = checkout / lower
    before = path.read_text()
    try:
        path.write_text(f"{before}\n\ndef _lazily() -> None:\n    import {higher}\n")
        done = lint(checkout)
    finally:
        path.write_text(before)
    assert done.returncode == 1
    assert lower.removesuffix(".py").replace("/", ".").rpartition(".")[2] in done.stdout


def test_every_package_is_typed_and_every_folder_a_package() -> None:
    for package in (ROOT / "dreambooth", ROOT / "pipelines"):
        assert (package / "py.typed").exists()
        for path in package.rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_no_module_of_orchestration_lies_flat_but_the_messages() -> None:
    assert {path.name for path in (ROOT / "pipelines").glob("*.py")} == {"__init__.py", "tasks.py"}


def test_docstrings_stand_alone() -> None:
    fragment = re.compile(r"(Of|That|By|With|Those|Apart|For|As(?! many)) ")
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value.value}"
        for package in ("dreambooth", "pipelines")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if fragment.match(node.value.value)
    ]
    assert found == []
