"""What does a fault cost a batch? Each is struck on purpose; the table of docs/faults.md is made from what is measured.

    python -m tests.bench.faults                     # all faults; about 15 minutes on two cores
    python -m tests.bench.faults worker-killed ...   # some of them

A batch of two subjects of two classes goes through one lane, in steps slow enough to be reported one by one. In the
middle of the first subject's training something is killed; then the batch goes on, or the same command is given again.
The result is compared with that of a batch that nothing happened to. Figures go to output/bench/faults.json.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import yaml
from s3fs import S3FileSystem

from dreambooth.miniature import subject_dir
from pipelines.driver.relay import MARK, RELAY_VARIABLE
from pipelines.storage import files, publications
from pipelines.tracking.client import connect, quietly
from tests.bench.stamps import Figures, stamp, stamped, together
from tests.integration.faulty_store import faulty_store

NAMES = ("coral-car", "navy-dog")
STEPS, CHECKPOINT_EVERY, STRIKE_AT = 20, 4, 6
MICRO_STEPS = 8
SETTINGS = {
    "prior": {"num_class_images": 8, "num_inference_steps": 4},
    "train": {
        "max_train_steps": STEPS,
        "gradient_accumulation_steps": MICRO_STEPS,
        "checkpoint_every": CHECKPOINT_EVERY,
    },
    "evaluation": {"enabled": False},
    "cluster": {"lanes": 1},
}
LAUNCHER = Path(__file__).parents[2] / "infra" / "s3" / "swift.py"


@dataclass(kw_only=True)
class Batch:
    """The command of a batch in a folder, given as often as it takes; `step` is the last one it was seen at."""

    folder: Path
    root: str
    environment: Mapping[str, str] = field(default_factory=dict)
    step: int = 0
    driver: "subprocess.Popen[str] | None" = None

    def start(self) -> None:
        """Give the command."""
        rows = [
            {"name": name, "class_noun": name.rsplit("-", 1)[-1], "instance_images": str(subject_dir(name))}
            for name in NAMES
        ]
        table = self.folder / "pets.yaml"
        table.write_text(yaml.safe_dump(SETTINGS | {"storage": {"root": self.root}, "subjects": rows}))
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "batch", str(table)],
            cwd=self.folder,
            env=os.environ | {RELAY_VARIABLE: "1"} | dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def until_struck(self) -> None:
        """Until the first subject is between two checkpoints."""
        assert self.driver is not None
        assert self.driver.stderr is not None
        said = []
        for line in self.driver.stderr:
            said.append(line)
            if not line.startswith(MARK):
                continue
            running = json.loads(line.removeprefix(MARK)).get("running", {})
            if NAMES[0] in running and running[NAMES[0]]["step"] >= STRIKE_AT:
                self.step = int(running[NAMES[0]]["step"])
                return
        raise AssertionError("".join(said))

    def finish(self) -> int:
        """Wait for its end; returns the exit code."""
        assert self.driver is not None
        self.stdout, self.stderr = self.driver.communicate(timeout=600)
        return self.driver.returncode

    def processes(self, title: str) -> list[psutil.Process]:
        """Processes of the batch's own Ray whose title holds this."""
        assert self.driver is not None
        found = []
        for process in psutil.Process(self.driver.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if re.search(title, " ".join(process.cmdline())):
                    found.append(process)
        assert found, title
        return found

    def weights(self) -> dict[str, dict[str, str]]:
        """sha256 of every published file, by subject."""
        found = {}
        for name in NAMES:
            manifest = publications.published(files.join(self.root, name, "model"))
            assert manifest is not None, name
            found[name] = {file: record.sha256 for file, record in manifest.files.items()}
        return found

    def resumed_from(self) -> int:
        """The step from which the first subject's last attempt went on."""
        fs, path = files.filesystem(files.join(self.root, NAMES[0], "training"))
        [record] = [name for name in fs.ls(path, detail=False) if name.endswith(".json")]
        return int(json.loads(fs.cat_file(record))["resumed_from"])

    def versions(self) -> dict[str, int]:
        """How many versions each model has in the registry."""
        with quietly():
            found = [version.name for version in connect(f"sqlite:///{self.folder}/mlflow.db").search_model_versions()]
        return {name: found.count(f"dreambooth-{name}") for name in NAMES}


def kill(title: str) -> Callable[[Batch], None]:
    def strike(batch: Batch) -> None:
        for process in batch.processes(title):
            process.kill()

    return strike


def signals(*numbers: signal.Signals) -> Callable[[Batch], None]:
    """To the driver, half a second apart."""

    def strike(batch: Batch) -> None:
        assert batch.driver is not None
        for number in numbers:
            batch.driver.send_signal(number)
            time.sleep(0.5)

    return strike


def kill_all(batch: Batch) -> None:
    """The machine's power is cut: driver, queue, lanes, all at once."""
    assert batch.driver is not None
    for process in [*psutil.Process(batch.driver.pid).children(recursive=True), psutil.Process(batch.driver.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is done to the batch, and whether the command has to be given again; `codes` are those it may end with."""

    what: str
    strike: Callable[[Batch], None]
    again: bool = False
    codes: tuple[int, ...] = (0,)


FAULTS = {
    "worker-killed": Fault(what="the lane's worker is killed (SIGKILL)", strike=kill("RayTrainWorker")),
    "lane-killed": Fault(
        what="the lane is killed: its controller and its worker", strike=kill(r"TrainController|RayTrainWorker")
    ),
    "queue-killed": Fault(what="the queue is killed", strike=kill(r"ray::\S*Queue")),
    "driver-killed": Fault(
        what="the driver is killed", strike=signals(signal.SIGKILL), again=True, codes=(-signal.SIGKILL,)
    ),
    "machine-lost": Fault(
        what="driver, queue and lane are killed at once", strike=kill_all, again=True, codes=(-signal.SIGKILL,)
    ),
    "ctrl-c": Fault(what="Ctrl-C", strike=signals(signal.SIGINT), again=True, codes=(130,)),
    "ctrl-c-twice": Fault(
        what="Ctrl-C, and again", strike=signals(signal.SIGINT, signal.SIGINT), again=True, codes=(130,)
    ),
}
STORE_FAULTS = {
    "store-away": "the store is away for 20 seconds",
    "store-busy": "the store answers 503 to one call in five, all the time",
}


def measure(name: str, folder: Path, calm: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Strike a batch, bring it to its end, and say what that cost."""
    if name in STORE_FAULTS:
        with object_store(folder / "store") as (swift, environment), patch.dict(os.environ, environment):
            return _measure_store(name, folder, calm, swift, environment)
    fault = FAULTS[name]
    batch = Batch(folder=folder, root=str(folder / "out"))
    batch.start()
    batch.until_struck()
    fault.strike(batch)
    code = batch.finish()
    assert code in fault.codes, (name, code, batch.stderr)
    if fault.again:
        batch.start()
        assert batch.finish() == 0, batch.stderr
    return row(name, fault.what, batch, calm, again=fault.again)


def _measure_store(
    name: str,
    folder: Path,
    calm: Mapping[str, Mapping[str, str]],
    swift: Callable[[str], None],
    environment: Mapping[str, str],
) -> dict[str, Any]:
    batch = Batch(folder=folder, root=f"s3://dreambooth/{name}", environment=environment)
    if name == "store-away":
        batch.start()
        batch.until_struck()
        swift("stop")
        time.sleep(20)
        swift("start")
        assert batch.finish() == 0, batch.stderr
    else:
        with faulty_store(environment["AWS_ENDPOINT_URL_S3"], every=5) as (address, store):
            batch.environment = {**environment, "AWS_ENDPOINT_URL": address, "AWS_ENDPOINT_URL_S3": address}
            batch.start()
            assert batch.finish() == 0, batch.stderr
        return row(name, STORE_FAULTS[name], batch, calm, again=False) | {
            "calls": store.calls,
            "refused": store.refused,
        }
    return row(name, STORE_FAULTS[name], batch, calm, again=False)


def row(name: str, what: str, batch: Batch, calm: Mapping[str, Mapping[str, str]], *, again: bool) -> dict[str, Any]:
    """What there is to say of a fault that a batch has outlived."""
    summary = files.read_json(files.join(batch.root, "batches", "pets", "summary.json"))
    resumed = batch.resumed_from()
    [struck] = [one for one in summary["results"] if one["subject"] == NAMES[0]]
    return {
        "fault": name,
        "what": what,
        "command_again": again,
        "subjects_lost": len(NAMES) - summary["subjects"]["done"],
        "versions": batch.versions(),
        "weights_as_undisturbed": batch.weights() == calm,
        "seen_at_step": batch.step,
        "resumed_from": resumed,
        "attempts": struck["attempts"],
        "steps_repeated": max(0, batch.step - resumed) if struck["attempts"] > 1 else 0,
        "checkpoint_every": CHECKPOINT_EVERY,
    }


@contextmanager
def object_store(folder: Path) -> Iterator[tuple[Callable[[str], None], dict[str, str]]]:
    """Within, an S3 store of its own: what starts and stops it, and the variables that lead there."""

    def swift(command: str) -> None:
        subprocess.run(
            [sys.executable, str(LAUNCHER), command, "--folder", str(folder)], check=True, stdout=subprocess.DEVNULL
        )

    arguments = [sys.executable, str(LAUNCHER), "start", "--folder", str(folder)]
    said = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    exports = (line.removeprefix("export ").partition("=") for line in said.splitlines())
    try:
        yield swift, {name: value for name, _, value in exports}
    finally:
        swift("stop")
        S3FileSystem.clear_instance_cache()  # an open file system keeps the address that it was opened with


def undisturbed(folder: Path) -> dict[str, dict[str, str]]:
    """The weights of a batch that nothing happens to."""
    batch = Batch(folder=folder, root=str(folder / "out"))
    batch.start()
    assert batch.finish() == 0, batch.stderr
    return batch.weights()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", default=[*FAULTS, *STORE_FAULTS])
    parser.add_argument("--json", type=Path, default=Path("output/bench/faults.json"))
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    rows: list[dict[str, Any]] = []
    parts: list[Figures] = []
    with tempfile.TemporaryDirectory(prefix="dreambooth-faults-") as folder:
        Path(folder, "calm").mkdir()
        calm = undisturbed(Path(folder, "calm"))
        for name in options.faults:
            Path(folder, name).mkdir()
            at = stamp()
            rows.append(measure(name, Path(folder, name), calm))
            parts.append(stamped({name: rows[-1]}, at))
            print(json.dumps(rows[-1]), flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(together(*parts), indent=2) + "\n")
    print("\n| fault | subjects lost | seen at step | resumed from step | steps repeated |\n|---|---|---|---|---|")
    for one in rows:
        figures = [str(one[key]) for key in ("subjects_lost", "seen_at_step", "resumed_from", "steps_repeated")]
        print(f"| {one['what']} | {' | '.join(figures)} |")
    bad = [one["fault"] for one in rows if not sound(one)]
    if bad:
        sys.exit(f"not as it should be: {', '.join(bad)}")


def sound(one: Mapping[str, Any]) -> bool:
    """Whether nothing was lost, doubled or changed, and no more than one interval was repeated."""
    return (
        one["subjects_lost"] == 0
        and set(one["versions"].values()) == {1}
        and one["weights_as_undisturbed"]
        and one["steps_repeated"] <= CHECKPOINT_EVERY
    )


if __name__ == "__main__":
    main()
