"""What do lanes save? One batch against its subjects one by one, and against diffusers' script. `make bench-batch`.

    python tests/bench/batch.py                              # some 20 minutes on two cores
    python tests/bench/batch.py --peer train_dreambooth.py   # some 30 minutes
    python tests/bench/batch.py --parts counts sequential    # some of it; the rest is kept from earlier

Eight subjects of two classes, fifty class images a class, 200 steps of one pair each, no evaluation; every measurement
starts in an empty folder, and all times are wall times from a command to its end. The batch of eight is measured before
and after everything else, and the median counts (`batches_of_eight` has all). Every part is stamped when it is
measured, and only parts of one commit and machine are divided. Written to output/bench/batch.json:

- batch_vs_sequential: `dreambooth run` for each of eight subjects, one after the other in one folder, over one batch of
  the eight; `sequential_runs` says from how many runs (with `--parts sequential_few` from four, two of each class).
- batch_vs_peer: the script for each of eight, every time with a folder of class images of its own, over the batch;
  batch_vs_peer_shared_class: the same with one folder per class, shared by hand. The script samples with the scheduler
  of the base's settings, which for the miniature is the pipeline's own sampler, but in 50 steps at guidance 7.5;
  the two figures with `same_sampler` are over a batch that does that too.
  `peer_runs` says from how many runs of the script they come: sixteen, or with `--parts peer_few` four, of which the
  rest is reckoned.
- lane_busy_share: see `pipelines.driver.batch_summary.lane_busy_share`; seconds_per_subject: of batches of so many;
  control_plane, control_plane_100k: see tests/bench/control_plane.py; the seconds that were measured.
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
from batch_figures import COUNT, KEPT, OUTPUT, keep, known
from peer import Peer
from stamps import Figures, stamp

from dreambooth.miniature import subject_dir
from pipelines.storage.files import read_json

SUBJECTS = ("coral-car", "mint-dog", "lime-car", "navy-dog")
STEPS, CLASS_IMAGES = 200, 50
SETTINGS = {
    "prior": {"num_class_images": CLASS_IMAGES},
    "train": {"max_train_steps": STEPS, "micro_batch_size": 1},
    "evaluation": {"enabled": False},
}
PEER_SAMPLER = {"num_inference_steps": 50, "guidance_scale": 7.5}
"""What diffusers' script leaves at its pipeline's defaults."""
DREAMBOOTH = [sys.executable, "-m", "pipelines.cli"]


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


def measure_batch() -> Figures:
    """Again and again, between what it is compared with: a machine is not as fast at one time as at another."""
    seconds, share = batch(COUNT)
    return {"seconds": seconds, "lane_busy_share": share}


def measure_counts() -> Figures:
    return {str(count): batch(count)[0] for count in (1, 2, 4, 16)}


def measure_sequential(count: int = COUNT) -> Figures:
    """All eight, or the first few: the first of a class makes its class images, the others find them."""
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for subject in subjects(count):
            path = Path(name, f"{subject['name']}.yaml")
            path.write_text(yaml.safe_dump(SETTINGS | {"subject": subject}))
            seconds.append(timed([*DREAMBOOTH, "run", str(path)], Path(name)))
            note(f"one by one, {subject['name']}: {seconds[-1]:.0f} s")
    return {"seconds": sum(seconds[:2]) + (COUNT - 2) * statistics.mean(seconds[2:]), "runs": count}


def measure_same_sampler() -> Figures:
    return {"seconds": batch(COUNT, PEER_SAMPLER)[0]}


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


def measure_peer(script: Path) -> Figures:
    own = sum(script_seconds(script, COUNT, shared=False))
    return {"seconds": own, "shared_class": sum(script_seconds(script, COUNT, shared=True)), "runs": 2 * COUNT}


def measure_peer_few(script: Path) -> Figures:
    """Both from four runs, two of each class: the first of a class makes its class images, the second finds them."""
    car, dog, *later = script_seconds(script, 4, shared=True)
    return {
        "seconds": COUNT * (car + dog) / 2,
        "shared_class": car + dog + (COUNT - 2) * sum(later) / 2,
        "runs": 4,
    }


def measure_control_plane() -> Figures:
    script = Path(__file__).with_name("control_plane.py")
    done = subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.PIPE, text=True)
    measured: Figures = json.loads(done.stdout)
    note(f"the control plane: {measured}")
    return measured


def main() -> None:
    measures: dict[str, Callable[[], Figures]] = {
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
        measures |= {"same_sampler": measure_same_sampler, "peer": partial(measure_peer, options.peer)}
    usual = [part for measure in measures for part in ((measure,) if measure == "batch" else (measure, "batch"))]
    measures["sequential_few"] = partial(measure_sequential, count=4)
    if options.peer is not None:
        measures["peer_few"] = partial(measure_peer_few, options.peer)
    if unknown := set(options.parts or ()) - set(measures):
        parser.error(f"--parts: no {', '.join(sorted(unknown))}; there are {', '.join(measures)}")
    if not options.parts:
        KEPT.unlink(missing_ok=True)
    known()
    for part in options.parts or usual:
        note(f"measuring {part} …")
        at = stamp()
        keep(part.removesuffix("_few"), measures[part](), at)
    print(OUTPUT.read_text())


if __name__ == "__main__":
    main()
