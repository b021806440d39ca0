"""The public names of both packages: all there, and imported only when they are asked for."""

import subprocess
import sys
from types import ModuleType

import pytest

import dreambooth
import pipelines

HEAVY = {"torch", "diffusers", "transformers", "ray", "deepspeed", "mlflow", "pandas", "numpy", "fsspec"}


@pytest.mark.parametrize(
    "program",
    [
        "import dreambooth",
        "import pipelines",
        "from pipelines.cli import main; main(['--help'], standalone_mode=False)",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("package", [dreambooth, pipelines], ids=lambda package: package.__name__)
class TestNames:
    def test_every_name_is_what_its_module_defines(self, package: ModuleType) -> None:
        for name in package.__all__:
            found = getattr(package, name)
            assert found.__name__ == name
            assert found.__module__.startswith(f"{package.__name__}."), name

    def test_another_name_is_an_error_as_of_any_module(self, package: ModuleType) -> None:
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nonsense'"):
            package.nonsense  # noqa: B018

    def test_every_name_is_found_by_who_looks_for_it_interactively(self, package: ModuleType) -> None:
        assert set(package.__all__) <= set(dir(package))
