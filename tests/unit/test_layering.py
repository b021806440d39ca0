"""The layers: the method knows nothing of Ray, DeepSpeed and MLflow, and imports go one way."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dreambooth

METHOD = Path(dreambooth.__file__).parent
ROOT = METHOD.parent
VENDORS = {"ray", "deepspeed", "mlflow"}


def sources(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", sources(METHOD), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_method_names_neither_vendors_nor_pipelines(path: Path) -> None:
    assert not {name.partition(".")[0] for name in imported(path)} & (VENDORS | {"pipelines"})


def test_the_loop_is_below_the_stages_and_the_model_below_the_loop() -> None:
    forbidden = {
        "training.losses": {"training.model", "training.engine", "training.loop", "sampling.class_images", "models.export"},
        "training.model": {"training.engine", "training.loop", "sampling.class_images", "models.export"},
        "training.engine": {"training.loop", "sampling.class_images", "models.export"},
        "config.settings": {"data.images", "data.identifier", "training.model", "training.engine", "training.loop"},
        "config.subject": {"config.settings", "data.images", "data.identifier", "training.model", "training.engine"},
    }
    for module, above in forbidden.items():
        names = set(imported(METHOD / f"{module.replace('.', '/')}.py"))
        assert not names & {f"dreambooth.{name}" for name in above}, module


def test_every_package_is_typed_and_every_folder_a_package() -> None:
    for package in (METHOD, ROOT / "pipelines"):
        assert (package / "py.typed").exists()
        for path in sources(package):
            assert (path.parent / "__init__.py").exists(), path
