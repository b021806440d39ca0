"""How long does `make demo` take? Its command in a folder of its own; figures go to output/bench/demo.json.

    python tests/bench/demo.py

Two minutes on two cores. The installation before it is not counted.
"""

import json
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stamps import Figures, stamp, stamped

OUTPUT = Path("output/bench/demo.json")


def command(folder: Path) -> list[str]:
    """What `make demo` runs, with everything that it writes in this folder."""
    said = subprocess.run(["make", "--dry-run", "demo"], check=True, stdout=subprocess.PIPE, text=True).stdout
    [words] = [
        shlex.split(line) for line in said.replace("\\\n", " ").splitlines() if line.startswith(".venv/bin/dreambooth ")
    ]
    words[words.index("--output") + 1] = str(folder / "demo")
    return [*words, "--set", f"storage.prior={folder}/prior", "--set", f"tracking.uri=sqlite:///{folder}/mlflow.db"]


def figures(seconds: float, summary: Mapping[str, Any]) -> Figures:
    """What the page shows of a demo that took so long and left this summary."""
    similarity = summary["similarity"]
    return {
        "wall_seconds": round(seconds, 1),
        "class_image_seconds": round(summary["wall_seconds"]["class_images"], 1),
        "training_seconds": round(summary["wall_seconds"]["train"], 1),
        "evaluation_seconds": round(summary["wall_seconds"]["evaluate"], 1),
        "steps_per_second": summary["steps_per_second"],
        "worker_peak_mib": [size >> 20 for size in summary["peak_memory_bytes"]],
        "gain": round(similarity["identifier"] - similarity["class_before"], 3),
        "startup_seconds": summary["startup_seconds"],
    }


def main() -> None:
    at = stamp()
    with tempfile.TemporaryDirectory() as name:
        words = command(Path(name))
        began = time.perf_counter()
        subprocess.run(words, check=True)
        seconds = time.perf_counter() - began
        summary = json.loads(Path(name, "demo", "summary.json").read_text())
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(stamped(figures(seconds, summary), at), indent=2) + "\n")
    print(OUTPUT.read_text())


if __name__ == "__main__":
    main()
