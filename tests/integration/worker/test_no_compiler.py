"""DeepSpeed on a machine without a C++ compiler or ninja: nothing may be compiled at start."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path

from dreambooth.config.settings import ZeroConfig, load_config
from dreambooth.config.train import TrainConfig
from dreambooth.training.model import load_model
from pipelines.worker.deepspeed_engine import DeepSpeedEngine

base = Path(sys.argv[1])
subject = {"name": "x", "class_noun": "car", "identifier": "tfz", "instance_images": "x"}
train = {"learning_rate": 0.0005, "text_encoder_learning_rate": 0.0002, "identifier_learning_rate": None}
config = load_config({"subject": subject, "train": train})
engine = DeepSpeedEngine(load_model(base, config), config.train, ZeroConfig(stage=2), "cpu")
print(sorted(engine.learning_rates))
"""


def test_an_engine_starts_without_a_compiler(tiny_pipeline: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "empty"
    nothing.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CUDA_HOME")}
    environment |= {
        "PATH": str(nothing),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29655",
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_pipeline)],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[0.0002, 0.0005]"
    assert not (tmp_path / "extensions").exists()
