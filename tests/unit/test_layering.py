"""The layers: the method knows nothing of Ray, DeepSpeed and MLflow, and imports go one way."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dreambooth

METHOD = Path(dreambooth.__file__).parent
ROOT = METHOD.parent
VENDORS = {"ray", "deepspeed", "mlflow"}

IMPORT_ALL = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "deepspeed", "mlflow", "pipelines"}:
            raise ImportError(f"{name} is blocked: dreambooth has to do without it")

sys.meta_path.insert(0, Blocked())
import dreambooth
from dreambooth.quiet import quiet
quiet()

def fail(name):
    raise

for module in pkgutil.walk_packages(dreambooth.__path__, "dreambooth.", onerror=fail):
    importlib.import_module(module.name)
    print(module.name)
"""


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


def test_the_method_imports_without_the_vendors() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = {name_of(path) for path in sources(METHOD)} - {"dreambooth"}
    assert set(done.stdout.split()) == expected  # a folder without __init__.py would be passed over


@pytest.mark.parametrize("path", sources(METHOD), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_method_names_neither_vendors_nor_pipelines(path: Path) -> None:
    assert not {name.partition(".")[0] for name in imported(path)} & (VENDORS | {"pipelines"})


def test_the_loop_is_below_the_stages_and_the_model_below_the_loop() -> None:
    forbidden = {
        "losses": {"model", "engine", "training", "prior", "export"},
        "model": {"engine", "training", "prior", "export"},
        "engine": {"training", "prior", "export"},
        "config": {"images", "identifier", "model", "engine", "training"},
        "subject": {"config", "images", "identifier", "model", "engine", "training"},
    }
    for module, above in forbidden.items():
        names = set(imported(METHOD / f"{module}.py"))
        assert not names & {f"dreambooth.{name}" for name in above}, module


@pytest.mark.parametrize("module", ["subject_queue", "lane_worker", "train_worker", "samplers"])
def test_ray_starts_a_queue_a_lane_or_a_sampler_without_importing_torch(module: str) -> None:
    """Ray imports these in processes that never train too: the queue's, and the controller of every worker group."""
    program = f"import sys, pipelines.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "transformers", "mlflow"} & set(done.stdout.split())


def test_every_package_is_typed_and_every_folder_a_package() -> None:
    for package in (METHOD, ROOT / "pipelines"):
        assert (package / "py.typed").exists()
        for path in sources(package):
            assert (path.parent / "__init__.py").exists(), path


def test_what_workers_import_waits_for_no_library_they_do_not_use() -> None:
    modules = "pipelines.lane_worker, pipelines.train_worker, pipelines.queue_actor, pipelines.samplers"
    heavy = "('mlflow', 'matplotlib', 'pandas', 'ray', 'torch', 'diffusers')"
    script = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
