"""Does it work on every subject? Personalizes each as `make demo` does, and prints a table of similarities.

    python tests/bench/subjects.py                            # all subjects of the miniature
    python tests/bench/subjects.py photos/rex:dog photos/mug:cup --set train.max_train_steps=400

Pictures go to output/bench/<subject>/, figures to output/bench/subjects.json (or --json).
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from stamps import Figures, stamp, stamped, together

from dreambooth.config.settings import load_config
from dreambooth.miniature import subject_dir, subject_names
from dreambooth.quiet import quiet
from pipelines.cluster.ray_cluster import ray_cluster
from pipelines.driver.console import RunConsole
from pipelines.driver.personalize import personalize

COLUMNS = ("instance", "identifier", "class_before", "class_after", "gain")


def with_gain(similarity: dict[str, float]) -> dict[str, float]:
    """A subject's row: how far the identifier's samples are above the base model's of the class prompt, too."""
    return similarity | {"gain": similarity["identifier"] - similarity["class_before"]}


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {column: statistics.mean(row[column] for row in rows) for column in COLUMNS}


def subject_of(argument: str) -> dict[str, Any]:
    folder, _, class_noun = argument.partition(":")
    file = Path(folder, "subject.yaml")
    subject = yaml.safe_load(file.read_text()) if file.is_file() else {"name": Path(folder).name.replace("_", "-")}
    return subject | {"instance_images": folder} | ({"class_noun": class_noun} if class_noun else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", default=[str(subject_dir(name)) for name in subject_names()])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--json", type=Path, default=Path("output/bench/subjects.json"))
    options = parser.parse_args()
    quiet()
    # The default, one worker with two pairs a step, follows the loss curve of the demo's two workers with one each.
    common = {"storage": {"root": "output/bench"}}
    configs = [
        load_config({"subject": subject_of(argument)} | common, tuple(options.overrides))
        for argument in options.subjects
    ]
    parts: list[Figures] = []
    with ray_cluster(configs[0].cluster):
        for config in configs:
            at = stamp()
            result = personalize(config, RunConsole(quiet=True))
            parts.append(stamped({config.subject.name: with_gain(result.summary["similarity"])}, at))
            print(config.subject.name, result.summary["similarity"], result.summary["wall_seconds"], flush=True)
    rows = together(*parts)
    rows = together(rows, stamped({"mean": mean([rows[name] for name in rows["stamps"]])}, at))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print("| subject | instance images | with the identifier | class before | class after | gain |")
    print("|---|---|---|---|---|---|")
    for name in rows["stamps"]:
        print(f"| {name} | {' | '.join(f'{rows[name][column]:.2f}' for column in COLUMNS)} |")


if __name__ == "__main__":
    main()
