"""What do lanes save? One batch against the same subjects one `dreambooth run` after the other.

    python tests/bench/batch.py                    # eight subjects of two classes; about 15 minutes on two cores
    python tests/bench/batch.py --counts 1 8       # fewer points of the curve of seconds per subject

Fifty class images a class, 200 steps of one pair each, no evaluation; every measurement starts in an empty folder.
Figures go to output/bench/batch.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from dreambooth.miniature import subject_dir
from pipelines.storage import read_json

SUBJECTS = ("coral-car", "mint-dog", "lime-car", "navy-dog")
SETTINGS = {
    "prior": {"num_class_images": 50},
    "train": {"max_train_steps": 200, "checkpoint_every": 100},
    "evaluation": {"enabled": False},
}
OUTPUT = Path("output/bench/batch.json")
DREAMBOOTH = str(Path(sys.executable).with_name("dreambooth"))


def subjects(count: int) -> list[dict[str, Any]]:
    """So many subjects of two classes; names beyond the shipped four are of the same pictures."""
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


def batch_seconds(count: int) -> tuple[float, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "subjects.yaml").write_text(yaml.safe_dump(SETTINGS | {"subjects": subjects(count)}))
        seconds = timed([DREAMBOOTH, "batch", "subjects.yaml"], folder)
        summary: dict[str, Any] = read_json(str(folder / "output" / "batches" / "subjects" / "summary.json"))
    return seconds, summary


def sequential_seconds(count: int) -> float:
    with tempfile.TemporaryDirectory() as name:
        folder, total = Path(name), 0.0
        for subject in subjects(count):
            path = folder / f"{subject['name']}.yaml"
            path.write_text(yaml.safe_dump(SETTINGS | {"subject": subject}))
            total += timed([DREAMBOOTH, "run", str(path)], folder)
            print(f"  {subject['name']} alone: {total:.0f} s so far", file=sys.stderr, flush=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="has to hold 8")
    options = parser.parse_args()
    figures: dict[str, Any] = {"seconds_per_subject": {}}
    for count in options.counts:
        seconds, summary = batch_seconds(count)
        figures["seconds_per_subject"][str(count)] = round(seconds / count, 1)
        print(f"a batch of {count}: {seconds:.0f} s", file=sys.stderr, flush=True)
        if count == 8:
            figures |= {"batch_seconds": round(seconds, 1), "lane_busy_share": summary["lane_busy_share"]}
    figures["sequential_seconds"] = round(sequential_seconds(8), 1)
    figures["batch_vs_sequential"] = round(figures["sequential_seconds"] / figures["batch_seconds"], 2)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
