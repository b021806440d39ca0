"""Lanes that share a GPU: Ray places their worker groups side by side. No GPU is needed, as Ray only counts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("lanes_on_one_gpu.py")


def test_two_lanes_run_at_once_on_one_gpu(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path)}  # where Ray keeps a token
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(
        command, check=True, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, timeout=300
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {"0": ["0"], "1": ["0"]}
