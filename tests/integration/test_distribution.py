"""What a registry would hand out: an sdist, the wheel built from it, and a run from that wheel without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import dreambooth

ROOT = Path(dreambooth.__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"
FAST = {
    "prior.num_class_images": 2,
    "prior.num_inference_steps": 2,
    "evaluation.images_per_prompt": 1,
    "evaluation.num_inference_steps": 2,
}


def run(*command: str | Path, cwd: Path) -> str:
    surroundings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=surroundings, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def built(kind: str, source: Path, target: Path) -> Path:
    return target / run(sys.executable, "-c", BUILD, kind, target, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which is built from the files that git knows or would take."""
    folder = tmp_path_factory.mktemp("build")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "checkout" / name)
    with tarfile.open(built("sdist", folder / "checkout", folder)) as sdist:
        sdist.extractall(folder / "sdist", filter="data")
    [unpacked] = (folder / "sdist").iterdir()
    return built("wheel", unpacked, folder)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dreambooth` in an environment that has the wheel, and this one's packages for its dependencies.

    That the wheel declares them all is held by tests/unit/test_release.py; the workflow installs them with it.
    """
    environment = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment.parent)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install")
    run(*pip, "--no-deps", "--no-index", wheel, cwd=environment.parent)
    packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=wheel.parent).strip()
    )
    # The .pth files of a folder that comes in by one are not read, so this checkout does not come with it.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return environment / "bin" / "dreambooth"


@pytest.mark.slow
class TestWheel:
    def test_it_holds_the_packages_and_what_they_read(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            names = {name for name in archive.namelist() if not name.startswith("dreambooth-")}
        tracked = run("git", "ls-files", "dreambooth", "pipelines", cwd=ROOT).splitlines()
        read = {name for name in tracked if not Path(name).name.startswith(".")}
        assert {name.partition("/")[0] for name in names} == {"dreambooth", "pipelines"}
        assert read - names == set()

    def test_the_command_answers(self, installed: Path, tmp_path: Path) -> None:
        assert "Personalize one subject" in run(installed, "--help", cwd=tmp_path)
        first = run(installed, "version", cwd=tmp_path).splitlines()[0]
        assert first.split() == ["dreambooth", dreambooth.__version__]  # without a commit: it is no checkout

    def test_a_run_of_two_steps(self, installed: Path, tmp_path: Path) -> None:
        where = "from dreambooth.miniature import subject_dir; print(subject_dir('coral-car'))"
        images = Path(run(installed.with_name("python"), "-c", where, cwd=tmp_path).strip())
        assert installed.parents[1] in images.parents
        settings = [word for name, value in FAST.items() for word in ("--set", f"{name}={value}")]
        run(installed, "run", "--images", images, "--steps", "2", "--quiet", *settings, cwd=tmp_path)
        assert (tmp_path / "output" / "coral-car" / "summary.json").is_file()
        assert (tmp_path / "mlflow.db").is_file()
