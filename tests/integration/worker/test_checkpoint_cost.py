"""What a checkpoint costs: hardly a moment of the training's thread, and the memory of one snapshot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(900)
def test_a_checkpoint_blocks_hardly_a_moment_and_takes_one_snapshot(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.checkpoint_cost", "--folder", str(tmp_path)]
    measured = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert measured.returncode == 0, measured.stderr
    cost = json.loads(measured.stdout.splitlines()[-1])
    print(cost)
    assert cost["checkpoint_bytes"] > 600e6  # a model of more than 200 MB, and both moments
    assert cost["blocked_seconds"] < 0.05 * cost["step_seconds"]
    assert cost["extra_bytes"] < cost["checkpoint_bytes"] + (32 << 20)  # what is hashed and written at a time
