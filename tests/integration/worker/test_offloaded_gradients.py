"""What the plan says of gradients beside an offloaded optimizer, against what DeepSpeed keeps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.plan.footprint import Footprint

SCRIPT = Path(__file__).with_name("offloaded_gradients.py")


def test_gradients_that_stay_on_the_device(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "kept.json"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = {tuple(json.loads(case)): size for case, size in json.loads((tmp_path / "kept.json").read_text()).items()}
    assert len(kept) == 12
    for (stage, weights, micro_steps), size in kept.items():
        weight = 2 if weights == "bf16" else 4
        footprint = Footprint(trained=1, weight=weight, offload_optimizer=True, accumulates=micro_steps > 1)
        # The first of bf16 weights' gradients go as the partition comes.
        slack = 1 if (stage, weights, micro_steps) == (1, "bf16", 2) else 0
        planned = footprint.state_bytes(stage, 1) - weight
        assert planned - slack <= size <= planned, (stage, weights, micro_steps)
    assert kept[2, "fp32", 1] == 0
    assert kept[1, "fp32", 2] == pytest.approx(4)
