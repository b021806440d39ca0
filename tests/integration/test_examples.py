"""The examples run as they stand there; those with Ray, in as few steps as a test has time for."""

import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

import dreambooth
from dreambooth.miniature import PIPELINE_DIR

EXAMPLES = Path(dreambooth.__file__).parents[1] / "examples"
UNET = Path("unet", "diffusion_pytorch_model.safetensors")
TEXT_ENCODER = Path("text_encoder", "model.safetensors")


def ran(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False, cwd=cwd, timeout=400
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def changed(folder: Path, weights: Path) -> dict[str, bool]:
    trained, base = load_file(folder / weights), load_file(PIPELINE_DIR / weights)
    assert trained.keys() == base.keys()
    return {name: not torch.equal(trained[name], base[name]) for name in base}


def is_a_picture(path: Path) -> bool:
    with Image.open(path) as picture:
        return picture.size == (64, 64) and len(picture.getcolors(4096) or range(4097)) > 100


class TestOneSubject:
    """The method alone: no Ray, DeepSpeed or MLflow is even imported."""

    SCRIPT = EXAMPLES / "one_subject.py"

    def test_it_fine_tunes_the_miniature(self, tmp_path: Path) -> None:
        beside = "import sys; print(*{'ray', 'deepspeed', 'mlflow', 'pipelines'} & set(sys.modules))"
        *losses, imported = ran("-c", self.SCRIPT.read_text() + beside, cwd=tmp_path).splitlines()
        assert [int(line.split()[0]) for line in losses] == list(range(1, 21))
        assert all(0 < float(line.split()[1]) < 2 for line in losses)
        assert imported == ""
        parts = changed(tmp_path / "coral-car", UNET)
        assert sum(parts.values()) > 0.9 * len(parts)
        assert is_a_picture(tmp_path / "coral-car.png")


def test_a_metric_of_ones_own(tmp_path: Path) -> None:
    words = ran(EXAMPLES / "custom_metric.py", cwd=tmp_path).split()
    assert words[0] == "dino"
    assert abs(float(words[-1])) < 0.5  # the base model doesn't know the subject


def test_a_family_of_ones_own(tmp_path: Path) -> None:
    losses = ran(EXAMPLES / "custom_family.py", cwd=tmp_path).splitlines()
    assert [int(line.split()[0]) for line in losses] == [1, 2, 3, 4, 5]
    trained = changed(tmp_path / "clip-skip-car", TEXT_ENCODER)
    layers = sorted({int(name.split("layers.")[1].split(".")[0]) for name in trained if "layers." in name})
    # The layer that the family leaves out got no gradient and stays as it was; all before it were trained.
    assert not any(trained[name] for name in trained if f"layers.{layers[-1]}." in name)
    assert all(trained[name] for name in trained if f"layers.{layers[-2]}." in name and "k_proj.bias" not in name)
    assert is_a_picture(tmp_path / "clip-skip-car.png")


def test_a_batch_from_a_table_and_its_model_by_mlflow_alone(tmp_path: Path) -> None:
    few = {
        "train.max_train_steps": 2,
        "prior.num_class_images": 2,
        "prior.num_inference_steps": 2,
        "evaluation.enabled": "false",
    }
    settings = [word for name, value in few.items() for word in ("--set", f"{name}={value}")]
    ran("-m", "pipelines.cli", "batch", EXAMPLES / "batch.yaml", "--quiet", *settings, cwd=tmp_path)
    ran(EXAMPLES / "from_mlflow.py", cwd=tmp_path)
    assert is_a_picture(tmp_path / "from-mlflow-0.png")
    assert is_a_picture(tmp_path / "from-mlflow-1.png")


def test_nothing_of_ours_is_imported_to_load_from_mlflow() -> None:
    assert not {"dreambooth", "pipelines"} & {
        line.split()[1] for line in (EXAMPLES / "from_mlflow.py").read_text().splitlines() if line.startswith("import")
    }
