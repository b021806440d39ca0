"""The miniature's pretraining from first step to figures, in seconds of training: all of it runs, none is good."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from dreambooth.miniature.pretraining.quality import BOUNDS


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_stage_and_the_figures(tmp_path: Path) -> None:
    module = "dreambooth.miniature.pretraining.pretrain"
    command = [sys.executable, "-m", module, "--output", str(tmp_path), "--minutes", "0.2"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "weights" / "quality.json").read_text())
    assert set(BOUNDS) <= set(figures)
    assert figures["vae_psnr_photographs"] is None  # there were none
    assert 0 <= figures["prompt_place"] <= 1
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "weights" / "pipeline")
    assert pipeline.tokenizer.model_max_length == 24
    assert len([*(tmp_path / "subjects").iterdir()]) >= 8
