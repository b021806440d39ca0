"""Every line of README's code blocks runs, in its order, in a folder with photographs of a dog; in fewer steps."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import dreambooth
from dreambooth.miniature import subject_dir
from pipelines.cli import main
from pipelines.tracking.client import connect, quietly

ROOT = Path(dreambooth.__file__).parents[1]
FEW_STEPS = ("train.max_train_steps=2", "prior.num_class_images=2", "prior.num_inference_steps=2")
FEW_SAMPLES = ("evaluation.images_per_prompt=1", "evaluation.num_inference_steps=2")
SMALLER = {
    "run": [word for setting in (*FEW_STEPS, *FEW_SAMPLES) for word in ("--set", setting)],
    "batch": [word for setting in (*FEW_STEPS, "evaluation.enabled=false") for word in ("--set", setting)],
    "generate": ["--steps", "2"],
    "evaluate": [word for setting in FEW_SAMPLES for word in ("--set", setting)],
}
"""What a command gets besides README's words."""
SECONDS_TO_SERVE = 120
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def lines() -> list[str]:
    """The lines of README's code blocks, without comments."""
    blocks = re.findall(r"(?ms)^```[a-z]*\n(.*?)^```", (ROOT / "README.md").read_text())
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


@pytest.fixture
def folder(working_folder: Path, tracking_in: Callable[[Path], str]) -> Iterator[Path]:
    """A working folder as after a clone and an installation, with a few photographs."""
    shutil.copytree(subject_dir("mint-dog"), working_folder / "photos" / "rex", ignore=lambda *_: ["subject.yaml"])
    tracking_in(working_folder)
    for name in ("Makefile", "examples"):
        (working_folder / name).symlink_to(ROOT / name)
    (working_folder / ".venv").symlink_to(sys.prefix)
    return working_folder


def made(words: list[str]) -> None:
    """`make` itself is not run: its demo takes minutes, and its tests are these. It has the target, and can make it."""
    done = subprocess.run([*words, "--dry-run"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ".venv/bin/" in done.stdout


def in_a_shell(line: str) -> None:
    """Afterwards the shell has this environment's `dreambooth`."""
    done = subprocess.run(
        ["bash", "-c", f"{line} && command -v dreambooth"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).samefile(Path(sys.executable).with_name("dreambooth"))


def ran(words: list[str]) -> str:
    """What a command prints, in this process and on the Ray that is there."""
    result = CliRunner().invoke(main, [*words, *SMALLER[words[0]]])
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"
    return result.output


def served(words: list[str]) -> list[str]:
    """The subjects that a service names; it is asked for a picture, and stopped by Ctrl-C."""
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    answers: list[dict[str, object]] = []
    ended = threading.Event()

    def look() -> None:
        ends = time.monotonic() + SECONDS_TO_SERVE
        while time.monotonic() < ends and not answers and not ended.wait(0.2):
            body = json.dumps({"subject": "rex", "prompt": "a [V] dog", "num_inference_steps": 2}).encode()
            request = urllib.request.Request(f"{address}/generate", body, {"Content-Type": "application/json"})
            try:
                with _OPENER.open(request, timeout=60) as answer:
                    answers.append(json.load(answer))
            except (urllib.error.URLError, OSError):
                continue
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    asking = threading.Thread(target=look)
    asking.start()
    try:
        result = CliRunner().invoke(main, [*words, "--port", address.rpartition(":")[2]])
    finally:
        ended.set()
        asking.join()
        serve.shutdown()
    assert result.exit_code == 0, result.output
    assert "stopped" in result.output
    assert [sorted(answer)[:1] for answer in answers] == [["images"]], result.output
    return re.findall(r"(?m)^(\S+) +\S+ +\S+ +models:", result.output)


def test_every_line_runs(folder: Path, ray_session: None) -> None:
    printed: dict[str, str] = {}
    for line in lines():
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            made(words)
        elif words[0] == ".":
            in_a_shell(shlex.join(words))
        elif words[:2] == ["dreambooth", "serve"]:
            printed["serve"] = " ".join(served(words[1:]))
        else:
            assert words[0] == "dreambooth", line
            printed[" ".join(word for word in words[1:] if word in SMALLER or word == "--dry-run")] = ran(words[1:])
    assert printed.keys() == {"run --dry-run", "run", "generate", "batch", "evaluate", "serve"}
    assert "memory at its peak" in printed["run --dry-run"]
    assert (folder / "output" / "rex" / "report.html").is_file()
    assert len(list((folder / "generated").rglob("*.png"))) == 9  # eight, and their contact sheet
    assert (folder / "output" / "batches" / "batch" / "report.html").is_file()
    with quietly():
        champion = connect(f"sqlite:///{folder}/mlflow.db").get_model_version_by_alias("dreambooth-rex", "champion")
    assert float(champion.tags["miniature.dino"]) < 1
    assert printed["serve"] == "rex"
