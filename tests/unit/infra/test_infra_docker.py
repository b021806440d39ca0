"""The image, as far as it can be judged without building it: a linter for Dockerfiles, its pins, what is copied.

What is not tested here: that Ray's image of this version and platform exists, and what a build of it does.
"""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "infra" / "docker" / "Dockerfile"
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n", " ", DOCKERFILE.read_text()).splitlines()
    if line and not line.startswith("#")
]


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def pinned(package: str) -> str:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    return pins[package]


def copied() -> set[str]:
    return {
        source
        for rest in arguments("COPY")
        for source in [word for word in rest.split() if not word.startswith("--")][:-1]
    }


def test_the_linter_has_nothing_to_say() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, DOCKERFILE], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (0, "")


def test_versions_are_those_that_everything_was_tested_with() -> None:
    defaults = dict(argument.partition("=")[::2] for argument in arguments("ARG"))
    assert defaults["RAY_VERSION"] == pinned("ray")
    python = f"Python 3.{defaults['PYTHON'].removeprefix('py3')}"
    assert python in (ROOT / "constraints.txt").read_text().splitlines()[0]
    # Whatever pip installs by name is held to the constraints file, or is the project itself.
    for command in arguments("RUN"):
        for install in re.findall(r"pip install [^&;]*", command):
            assert "--constraint constraints.txt" in install or "--no-deps" in install, install


def test_what_is_copied_exists_and_nothing_else_gets_in() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == copied()
    for source in copied():
        assert (ROOT / source).exists(), source
    assert (ROOT / "dreambooth" / "miniature" / "weights" / "pipeline" / "model_index.json").is_file()


def test_it_runs_as_a_user_that_kubernetes_can_tell_from_root() -> None:
    assert arguments("USER")[-1] == "1000"


def test_no_secret_is_asked_for_or_set() -> None:
    # A build argument or a variable stays readable in the image's history.
    named = " ".join([*arguments("ARG"), *arguments("ENV")]).replace("RAY_AUTH_MODE=token", "")
    assert not re.search(r"secret|password|_key|token", named, re.IGNORECASE)


@pytest.mark.parametrize(("compiler", "said"), [(None, "not there"), ("12.6", "of 12.6")])
def test_operations_that_cannot_be_built_are_left_out_and_that_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    compiler: str | None,
    said: str,
) -> None:
    if compiler:
        nvcc = tmp_path / "nvcc"
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {compiler}, V{compiler}.20'\n")
        nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    runpy.run_path(str(ROOT / "infra" / "docker" / "build_ops.py"))["main"]()
    assert "torch is made for CUDA 13.0" in (out := capsys.readouterr().out)
    assert said in out
