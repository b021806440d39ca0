"""What do lanes save? One batch against its subjects one by one, and against diffusers' script. `make bench-batch`.

    python tests/bench/batch.py                              # some 20 minutes on two cores
    python tests/bench/batch.py --peer train_dreambooth.py   # some 30 minutes
    python tests/bench/batch.py --parts counts sequential    # some of it; the rest is kept from earlier

Eight subjects of two classes, fifty class images a class, 200 steps of one pair each, no evaluation; every measurement
starts in an empty folder, and all times are wall times from a command to its end. The batch of eight is measured before
and after everything else, and the median counts (`batches_of_eight` has all). Written to output/bench/batch.json:

- batch_vs_sequential: `dreambooth run` for each of eight subjects, one after the other in one folder, over one batch of
  the eight; `sequential_runs` says from how many runs (with `--parts sequential_few` from four, two of each class).
- batch_vs_peer: the script for each of eight, every time with a folder of class images of its own, over the batch;
  batch_vs_peer_shared_class: the same with one folder per class, shared by hand. The script samples with the scheduler
  of the base's settings, which for the miniature is the pipeline's own sampler, but in 50 steps at guidance 7.5;
  the two figures with `same_sampler` are over a batch that does that too.
  `peer_runs` says from how many runs of the script they come: sixteen, or with `--parts peer_few` four, of which the
  rest is reckoned.
- lane_busy_share: see `pipelines.driver.batch_summary.lane_busy_share`; seconds_per_subject: of batches of so many;
  control_plane, control_plane_100k: see tests/bench/control_plane.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from benchmarks_page import stamped
from peer import Peer

from dreambooth.miniature import subject_dir
from pipelines.storage.files import read_json

SUBJECTS = ("coral-car", "mint-dog", "lime-car", "navy-dog")
COUNT, STEPS, CLASS_IMAGES = 8, 200, 50
SETTINGS = {
    "prior": {"num_class_images": CLASS_IMAGES},
    "train": {"max_train_steps": STEPS, "micro_batch_size": 1},
    "evaluation": {"enabled": False},
}
PEER_SAMPLER = {"num_inference_steps": 50, "guidance_scale": 7.5}
"""What diffusers' script leaves at its pipeline's defaults."""
SECONDS = ("batch", "sequential", "peer", "peer_shared_class", "batch_same_sampler")
OUTPUT = Path("output/bench/batch.json")
KEPT = OUTPUT.with_name("batch-seconds.json")
DREAMBOOTH = [sys.executable, "-m", "pipelines.cli"]

Raw = dict[str, Any]


def subjects(count: int) -> list[dict[str, Any]]:
    """So many subjects of two classes; names beyond the first four are of the same pictures."""
    return [
        {
            "name": f"{SUBJECTS[index % 4]}-{index // 4}",
            "class_noun": SUBJECTS[index % 4].rsplit("-", 1)[-1],
            "instance_images": str(subject_dir(SUBJECTS[index % 4])),
        }
        for index in range(count)
    ]


def timed(command: list[str], folder: Path) -> float:
    began = time.perf_counter()
    subprocess.run([*command, "--quiet"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def batch(count: int, prior: dict[str, Any] | None = None) -> tuple[float, float]:
    """Seconds of a batch, and the share of them that its lanes spent in steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = SETTINGS | {"prior": SETTINGS["prior"] | (prior or {}), "subjects": subjects(count)}
        (folder / "subjects.yaml").write_text(yaml.safe_dump(settings))
        seconds = timed([*DREAMBOOTH, "batch", "subjects.yaml"], folder)
        summary = read_json(str(folder / "output" / "batches" / "subjects" / "summary.json"))
    note(f"a batch of {count}: {seconds:.0f} s, {summary['lane_busy_share']:.0%} of lane time in steps")
    return seconds, summary["lane_busy_share"]


def measure_batch(raw: Raw) -> None:
    """Again and again, between what it is compared with: a machine is not as fast at one time as at another."""
    seconds, share = batch(COUNT)
    raw["batches_of_eight"] = [*raw.get("batches_of_eight", []), seconds]
    raw["shares"] = [*raw.get("shares", []), share]
    raw["batch"], raw["lane_busy_share"] = statistics.median(raw["batches_of_eight"]), statistics.median(raw["shares"])


def measure_counts(raw: Raw) -> None:
    raw["batches"] = {str(count): batch(count)[0] for count in (1, 2, 4, 16)}


def measure_sequential(raw: Raw, count: int = COUNT) -> None:
    """All eight, or the first few: the first of a class makes its class images, the others find them."""
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for subject in subjects(count):
            path = Path(name, f"{subject['name']}.yaml")
            path.write_text(yaml.safe_dump(SETTINGS | {"subject": subject}))
            seconds.append(timed([*DREAMBOOTH, "run", str(path)], Path(name)))
            note(f"one by one, {subject['name']}: {seconds[-1]:.0f} s")
    raw["sequential"] = sum(seconds[:2]) + (COUNT - 2) * statistics.mean(seconds[2:])
    raw["sequential_runs"] = count


def measure_same_sampler(raw: Raw) -> None:
    raw["batch_same_sampler"], _ = batch(COUNT, PEER_SAMPLER)


def script_seconds(script: Path, count: int, *, shared: bool) -> list[float]:
    """Seconds of diffusers' script for each of so many subjects."""
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        peer = Peer(script, Path(name) / "peer")
        for subject in subjects(count):
            noun = subject["class_noun"]
            one = peer.seconds(
                Path(subject["instance_images"]).name,
                noun,
                steps=STEPS,
                class_images=CLASS_IMAGES,
                class_folder=Path(name) / "class" / (noun if shared else subject["name"]),
            )
            seconds.append(one)
            note(f"the script, {'shared' if shared else 'own'} class images, {subject['name']}: {one:.0f} s")
    return seconds


def measure_peer(script: Path) -> Callable[[Raw], None]:
    def measure(raw: Raw) -> None:
        raw["peer"] = sum(script_seconds(script, COUNT, shared=False))
        raw["peer_shared_class"] = sum(script_seconds(script, COUNT, shared=True))
        raw["peer_runs"] = 2 * COUNT

    return measure


def measure_peer_few(script: Path) -> Callable[[Raw], None]:
    """Both from four runs, two of each class: the first of a class makes its class images, the second finds them."""

    def measure(raw: Raw) -> None:
        car, dog, *later = script_seconds(script, 4, shared=True)
        raw["peer"] = COUNT * (car + dog) / 2
        raw["peer_shared_class"] = car + dog + (COUNT - 2) * sum(later) / 2
        raw["peer_runs"] = 4

    return measure


def measure_control_plane(raw: Raw) -> None:
    script = Path(__file__).with_name("control_plane.py")
    done = subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.PIPE, text=True)
    raw["control_plane"] = json.loads(done.stdout)
    note(f"the control plane: {raw['control_plane']}")


def figures(raw: Raw) -> dict[str, Any]:
    """Ratios from seconds; None where one of the two was not measured."""

    def ratio(slow: str, fast: str) -> float | None:
        return round(raw[slow] / raw[fast], 2) if slow in raw and fast in raw else None

    batches = raw.get("batches", {}) | ({str(COUNT): raw["batch"]} if "batch" in raw else {})
    return {
        "batch_vs_sequential": ratio("sequential", "batch"),
        "batch_vs_peer": ratio("peer", "batch"),
        "batch_vs_peer_shared_class": ratio("peer_shared_class", "batch"),
        "batch_vs_peer_same_sampler": ratio("peer", "batch_same_sampler"),
        "batch_vs_peer_shared_class_same_sampler": ratio("peer_shared_class", "batch_same_sampler"),
        "lane_busy_share": raw.get("lane_busy_share"),
        "seconds_per_subject": {n: round(batches[n] / int(n), 1) for n in sorted(batches, key=int)},
        "control_plane": raw.get("control_plane"),
        "control_plane_100k": raw.get("control_plane_100k"),
        "sequential_runs": raw.get("sequential_runs"),
        "peer_runs": raw.get("peer_runs"),
        "batches_of_eight": [round(seconds, 1) for seconds in raw.get("batches_of_eight", ())],
        "seconds": {name: round(raw[name], 1) for name in SECONDS if name in raw},
    }


def keep(measured: Raw) -> Raw:
    """Write figures with those that were measured before, and return them all."""
    raw: Raw = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    raw |= measured
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps(raw, indent=2) + "\n")
    OUTPUT.write_text(json.dumps(stamped(figures(raw)), indent=2) + "\n")
    return raw


def main() -> None:
    measures = {
        "batch": measure_batch,
        "sequential": measure_sequential,
        "counts": measure_counts,
        "control_plane": measure_control_plane,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, metavar="PATH", help="diffusers' examples/dreambooth/train_dreambooth.py")
    parser.add_argument("--parts", nargs="+", help="measure only these, and keep the others of the last time")
    options = parser.parse_args()
    if options.peer is not None:
        measures |= {
            "same_sampler": measure_same_sampler,
            "peer": measure_peer(options.peer),
        }
    usual = [part for measure in measures for part in ((measure,) if measure == "batch" else (measure, "batch"))]
    measures["sequential_few"] = partial(measure_sequential, count=4)
    if options.peer is not None:
        measures["peer_few"] = measure_peer_few(options.peer)
    if unknown := set(options.parts or ()) - set(measures):
        parser.error(f"--parts: no {', '.join(sorted(unknown))}; there are {', '.join(measures)}")
    if not options.parts:
        KEPT.unlink(missing_ok=True)
    raw = keep({})
    for part in options.parts or usual:
        note(f"measuring {part} …")
        measures[part](raw)
        keep(raw)
    print(OUTPUT.read_text())


if __name__ == "__main__":
    main()
