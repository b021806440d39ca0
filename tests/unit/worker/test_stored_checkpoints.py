"""Checkpoints of a real training of a tiny base model: a damaged one is passed over, a full disk is a sentence."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_bytes import tensor_bytes

from dreambooth.config.settings import load_config
from dreambooth.models.base_model import resolve_base_model
from dreambooth.training.model import load_model
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.train_stage import train_task
from pipelines.plan.run_plan import Plan, make_plan
from pipelines.storage.faults import StorageFull
from pipelines.storage.files import filesystem
from pipelines.worker.behind import Behind
from pipelines.worker.checkpoints import StoredCheckpoints
from pipelines.worker.fine_tune import FineTuned, fine_tune
from pipelines.worker.history import History


class Killed(Exception):
    """Stands for whatever ends a process in the middle of a training."""


class Waiting(StoredCheckpoints):
    """Checkpoints that are whole, or have failed, before the next step, however fast it is."""

    def begin(self, engine: Any, history: History) -> Behind:
        writing = super().begin(engine, history)
        writing.wait()
        return writing


class Training:
    """A subject whose checkpoints lie at an address; `until` ends it after a step."""

    kind: type[StoredCheckpoints] = Waiting

    def __init__(self, base: Path, photographs: Path, uri: str) -> None:
        self._base, self._photographs, self.uri = base, photographs, uri
        self.warnings: list[str] = []

    def plan(self, *overrides: str) -> Plan:
        plain: dict[str, Any] = {
            "base_model": str(self._base),
            "subject": {
                "name": "rex",
                "class_noun": "dog",
                "identifier": "tfz",
                "instance_images": str(self._photographs),
            },
            "prior": {"prior_loss_weight": 0},
            "train": {"max_train_steps": 7, "learning_rate": 1e-2, "checkpoint_every": 2},
            "evaluation": {"enabled": False},
            "storage": {"root": "output"},
        }
        return make_plan(load_config(plain, overrides), Resources(cpus=2, gpus=0))

    def run(self, *overrides: str, until: int | None = None) -> FineTuned:
        plan = self.plan(*overrides)
        model = load_model(resolve_base_model(plan.config.base_model).directory, plan.config)
        checkpoints = self.kind(self.uri, need_bytes=plan.checkpoint_bytes, warn=self.warnings.append)

        def tell(message: dict[str, Any]) -> None:
            if message["kind"] == "step" and message["metrics"]["step"] == until:
                raise Killed

        return fine_tune(train_task(plan, None), plan.base, model, "cpu", checkpoints, tell)

    def steps(self) -> list[int]:
        """Those of the checkpoints that have a manifest."""
        fs, root = filesystem(self.uri)
        manifests = fs.glob(f"{root}/step-*/manifest.json") if fs.exists(root) else []
        return sorted(int(re.findall(r"step-(\d+)-", str(path))[0]) for path in manifests)


@pytest.fixture
def training(tiny_pipeline: Path, instance_folder: Path, tmp_path: Path) -> Callable[..., Training]:
    def make(uri: str = f"{tmp_path}/checkpoints") -> Training:
        return Training(tiny_pipeline, instance_folder, uri)

    return make


@pytest.fixture(scope="module")
def whole(tiny_pipeline: Path, instance_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FineTuned:
    """The result of a training that nothing happened to."""
    return Training(tiny_pipeline, instance_folder, f"{tmp_path_factory.mktemp('whole')}/checkpoints").run()


def assert_same(one: FineTuned, other: FineTuned) -> None:
    assert [step["loss"] for step in one.record["history"]] == [step["loss"] for step in other.record["history"]]
    assert [name for name in one.state if not torch.equal(one.state[name], other.state[name])] == []


def _cut(folder: Path) -> None:
    os.truncate(folder / "engine.pt", (folder / "engine.pt").stat().st_size - 1000)


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def _without_format(path: Path) -> None:
    manifest = json.loads(path.read_text())
    del manifest["metadata"]["format"]
    path.write_text(json.dumps(manifest))


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (_cut, r"engine\.pt at .*step-00000004.* has \d+ bytes, and its manifest says \d+ bytes"),
    "a byte": (
        lambda folder: _flip(folder / "engine.pt", 5000),
        r"engine\.pt at .*step-00000004.*: expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}",
    ),
    "a file gone": (lambda folder: (folder / "progress.json").unlink(), r"progress\.json at .* is missing"),
    "manifest cut": (lambda folder: os.truncate(folder / "manifest.json", 40), r"step-00000004.*/manifest\.json isn't"),
    "manifest no text": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"), "isn't JSON"),
    "manifest empty": (lambda folder: (folder / "manifest.json").write_text("[]"), "isn't a manifest that can be"),
    "a byte of the manifest": (
        lambda folder: _flip(folder / "manifest.json", (folder / "manifest.json").read_bytes().index(b'"size": ') + 9),
        r"and its manifest says \d+ bytes",
    ),
    "of another version": (
        lambda folder: _without_format(folder / "manifest.json"),
        r"step-00000004.* was written by another version, which this one can't read",
    ),
    "manifest gone": (
        lambda folder: (folder / "manifest.json").unlink(),
        r"step-00000004.* has no manifest\.json: it was never finished",
    ),
    "all gone": (_empty, ""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_whole_checkpoint_wins(training: Callable[..., Training], whole: FineTuned, damage: str) -> None:
    this, (strike, word) = training(), DAMAGE[damage]
    with pytest.raises(Killed):
        this.run(until=5)
    assert this.steps() == [2, 4]
    [newest] = Path(this.uri).glob("step-00000004-*")
    strike(newest)
    resumed = this.run()
    assert resumed.record["resumed_from"] == 2
    assert_same(resumed, whole)
    assert len(this.warnings) == (1 if word else 0)
    assert re.search(word, "".join(this.warnings))
    assert this.steps() == [4, 6]  # the damaged one has gone when there were two others
    assert len(list(Path(this.uri).iterdir())) == 2


def test_with_none_whole_it_begins_anew_and_names_all(training: Callable[..., Training], whole: FineTuned) -> None:
    this = training()
    with pytest.raises(Killed):
        this.run(until=5)
    for folder in Path(this.uri).iterdir():
        _cut(folder)
    resumed = this.run()
    assert resumed.record["resumed_from"] == 0
    assert ["step-00000004" in this.warnings[0], "step-00000002" in this.warnings[1]] == [True, True]
    assert_same(resumed, whole)


def test_a_copy_from_a_store_is_compared_too(training: Callable[..., Training], whole: FineTuned) -> None:
    this = training("memory://checkpoints-compared")
    with pytest.raises(Killed):
        this.run(until=5)
    fs, root = filesystem(this.uri)
    [newest] = fs.glob(f"{root}/step-00000004-*/engine.pt")
    content = bytearray(fs.cat_file(newest))
    content[5000] ^= 1
    fs.pipe_file(newest, bytes(content))
    resumed = this.run()
    assert resumed.record["resumed_from"] == 2
    assert "expected sha256" in this.warnings[0]
    assert_same(resumed, whole)


DYING = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_stored_checkpoints as tests
from pipelines.worker import history
write = history._write_json
def dying(content, file):
    write(content, file)
    if content["step"] >= 4:
        os.kill(os.getpid(), signal.SIGKILL)
history._write_json = dying
tests.Training.kind = tests.StoredCheckpoints
tests.Training(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]).run()
"""


def test_a_process_killed_while_it_writes_leaves_the_one_before(
    training: Callable[..., Training], whole: FineTuned, tiny_pipeline: Path, instance_folder: Path
) -> None:
    this = training()
    command = [sys.executable, "-c", DYING, str(Path(__file__).parent), str(tiny_pipeline), str(instance_folder)]
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}  # for what this file imports
    assert subprocess.run([*command, this.uri], check=False, env=here).returncode == -signal.SIGKILL
    assert this.steps() == [2]
    assert len(list(Path(this.uri).iterdir())) == 2  # what was written of the second
    resumed = this.run(until=None)
    assert resumed.record["resumed_from"] == 2
    assert_same(resumed, whole)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of its own, of so many bytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_sentence_and_leaves_what_was_whole(
    training: Callable[..., Training], whole: FineTuned, tmp_path: Path
) -> None:
    need = training().plan().checkpoint_bytes
    with small_disk(tmp_path / "disk", int(1.7 * need)) as disk:
        this = training(f"{disk}/checkpoints")
        said = (
            rf"can't write the checkpoint of step 4 \(about 1.0 MB\) to {disk}/checkpoints/step-\S+ \(0\.[1-9] MB free"
            r"\): no space is left there; .*The same command continues from the checkpoint of step 2"
        )
        with pytest.raises(StorageFull, match=said):
            this.run()
        assert len(list(Path(this.uri).iterdir())) == 1
        assert this.steps() == [2]
        subprocess.run(["mount", "-o", f"remount,size={5 * need}", str(disk)], check=True)
        resumed = this.run()
        assert resumed.record["resumed_from"] == 2
        assert_same(resumed, whole)


def test_a_disk_that_became_read_only(training: Callable[..., Training], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 50_000_000) as disk:
        this = training(f"{disk}/checkpoints")
        with pytest.raises(Killed):
            this.run(until=3)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(
            StorageFull, match=r"step 4.*read-only file system.*continues from the checkpoint of step 2"
        ):
            this.run()


@pytest.mark.parametrize("ema", ["null", "0.9"])
def test_a_limit_on_files_is_one_too(training: Callable[..., Training], ema: str) -> None:
    """Torch writes the engine's file, safetensors that of the moving average."""
    this = training()
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    trained = this.plan().trained_parameters
    resource.setrlimit(resource.RLIMIT_FSIZE, ((trained if ema == "null" else 3 * trained), most))
    try:
        with pytest.raises(StorageFull, match=r"can't write the checkpoint of step 2.*continues from the beginning"):
            this.run(f"train.ema_decay={ema}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert list(Path(this.uri).iterdir()) == []


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.ema_decay=0.9",),
        ("train.keep=best", "evaluation.every=2", "evaluation.bank=miniature", "evaluation.score_images=1"),
        ("train.train_text_encoder=false",),
    ],
)
def test_the_plan_knows_how_large_they_are(training: Callable[..., Training], overrides: tuple[str, ...]) -> None:
    this = training()
    with pytest.raises(Killed):
        this.run("evaluation.num_inference_steps=1", *overrides, until=3)
    [newest] = Path(this.uri).iterdir()
    assert tensor_bytes(newest) == pytest.approx(this.plan(*overrides).checkpoint_bytes, rel=0.01)
