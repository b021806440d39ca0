"""What README.md says of Python is run as it stands there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dreambooth
from dreambooth.miniature import PIPELINE_DIR

README = Path(dreambooth.__file__).parents[1] / "README.md"
UNET = Path("unet", "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def script() -> str:
    _, _, after = README.read_text().partition("\n## From Python\n")
    _, _, block = after.partition("\n```python\n")
    return block.partition("```")[0]


def test_it_is_about_ten_lines(script: str) -> None:
    assert 10 <= sum(bool(line) for line in script.splitlines()) <= 15


def test_the_method_alone_fine_tunes_the_miniature(script: str, tmp_path: Path) -> None:
    beside = "import sys; print(*{'ray', 'deepspeed', 'mlflow', 'pipelines'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script + beside], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    *losses, imported = done.stdout.splitlines()
    assert [int(line.split()[0]) for line in losses] == list(range(1, 21))
    assert all(0 < float(line.split()[1]) < 2 for line in losses)
    assert imported == ""
    trained, base = load_file(tmp_path / "coral-car" / UNET), load_file(PIPELINE_DIR / UNET)
    assert trained.keys() == base.keys()
    assert sum(not torch.equal(trained[name], base[name]) for name in base) > 0.9 * len(base)
    with Image.open(tmp_path / "coral-car.png") as picture:
        assert picture.size == (64, 64)
        assert len(picture.getcolors(4096) or range(4097)) > 100
