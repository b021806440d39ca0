"""Do two checkouts train the same? Loss curves and published weights, compared to the last bit.

    python tests/bench/same_losses.py BEFORE AFTER [--steps 12] [--output FOLDER]

BEFORE and AFTER are checkouts with a `.venv` each. Both do a run and a batch of three subjects, at fixed seeds, by
plain PyTorch with one worker and by ZeRO-2 with two. Prints a line for each, and exits with 1 where something differs.
What is in FOLDER already is not made again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SUBJECTS = ("coral-car", "lime-car", "navy-dog")
ENGINES = {"torch": ("cluster.num_workers=1",), "zero2": ("cluster.num_workers=2", "zero.stage=2")}
COMPARED = ("step", "loss", "instance_loss", "prior_loss", "learning_rate", "grad_norm")


def settings(folder: Path, engine: str, steps: int) -> list[str]:
    """The overrides of a command, whose results lie in a folder of its own."""
    chosen = [
        *ENGINES[engine],
        f"train.max_train_steps={steps}",
        "train.checkpoint_every=5",
        "prior.num_class_images=8",
        "prior.num_inference_steps=4",
        "evaluation.enabled=false",
        "evaluation.protocol=none",
        "cluster.lanes=1",
        f"storage.root={folder}",
        f"storage.prior={folder}/prior",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
    ]
    return [word for setting in chosen for word in ("--set", setting)]


def commands(checkout: Path, folder: Path, engine: str, steps: int) -> Iterator[tuple[str, list[str], Path]]:
    """What is done, its command, and where its subjects' folders lie."""
    program, photographs = str(checkout / ".venv" / "bin" / "dreambooth"), checkout / "dreambooth/miniature/subjects"
    for what in ("run", "batch"):
        place = folder / f"{what}-{engine}"
        place.mkdir(parents=True, exist_ok=True)
        if what == "run":
            command = [program, "run", "--images", str(photographs / SUBJECTS[0]), "--identifier", "tfz"]
        else:
            rows = [_row(name, photographs / name) for name in SUBJECTS]
            table = place / "three.jsonl"
            table.write_text("".join(json.dumps(row) + "\n" for row in rows))
            command = [program, "batch", str(table)]
        yield what, [*command, "--quiet", *settings(place, engine, steps)], place


def _row(name: str, images: Path) -> dict[str, str]:
    """A subject of the table; identifiers are rare tokens, and no two subjects share one."""
    noun = name.rsplit("-", 1)[-1]
    return {"name": name, "class_noun": noun, "identifier": f"{name[0]}fz", "instance_images": str(images)}


def results(place: Path) -> dict[str, tuple[list[dict[str, float]], dict[str, torch.Tensor]]]:
    """Curve and published tensors of every subject in a folder."""
    found = {}
    for model in place.glob("*/model"):
        [manifest] = model.glob("*/manifest.json")
        [record] = (model.parent / "training").glob("*.json")
        files = sorted(manifest.parent.rglob("*.safetensors"))
        tensors = {
            f"{path.relative_to(manifest.parent)}:{name}": tensor
            for path in files
            for name, tensor in load_file(path).items()
        }
        found[model.parent.name] = json.loads(record.read_text())["history"], tensors
    return found


def differences(before: Any, after: Any) -> list[str]:
    """What isn't the same to the last bit."""
    if before.keys() != after.keys():
        return [f"subjects {sorted(before)} and {sorted(after)}"]
    found = []
    for name in before:
        (curve, tensors), (other_curve, other_tensors) = before[name], after[name]
        steps = [[step[value] for value in COMPARED] for step in curve]
        others = [[step[value] for value in COMPARED] for step in other_curve]
        if steps != others:
            first = next((i for i, (a, b) in enumerate(zip(steps, others, strict=False)) if a != b), len(steps))
            found.append(f"{name}: curves from step {first + 1}")
        names = {n for n in tensors.keys() | other_tensors.keys() if not _same(tensors.get(n), other_tensors.get(n))}
        if names:
            found.append(f"{name}: {len(names)} of {len(tensors)} tensors, such as {min(names)}")
    return found


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def main() -> int:
    """Make what is missing, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    output, code = arguments.output or Path(tempfile.mkdtemp(prefix="same-losses-")), 0
    for engine in ENGINES:
        places: dict[str, dict[str, Path]] = {}
        for side in ("before", "after"):
            checkout: Path = getattr(arguments, side).absolute()
            for what, command, place in commands(checkout, output.absolute() / side, engine, arguments.steps):
                places.setdefault(what, {})[side] = place
                done = subprocess.run(command, cwd=place, env=os.environ, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"{what}, {engine}, {side}: exit code {done.returncode}\n{done.stderr[-2000:]}")
                    return 2
        for what, sides in places.items():
            before, after = results(sides["before"]), results(sides["after"])
            found = differences(before, after)
            steps, tensors = (sum(len(part[i]) for part in after.values()) for i in (0, 1))
            print(
                f"{what}, {engine}: {len(after)} subjects, {steps} steps, {tensors} tensors: {found or 'the same'}",
                flush=True,
            )
            code = code or (1 if found else 0)
    return code


if __name__ == "__main__":
    sys.exit(main())
