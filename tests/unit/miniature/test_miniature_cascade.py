"""miniature-cascade as it is shipped: what plain diffusers makes of it, and what the pipeline does."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline
from PIL import Image
from safetensors.torch import load_file

from dreambooth.config.settings import load_config
from dreambooth.evaluation.banks import default_bank
from dreambooth.evaluation.protocol import named
from dreambooth.miniature import CASCADE_DIR, subject_dir
from dreambooth.miniature.pretraining.quality_cascade import BOUNDS
from dreambooth.models.base_model import resolve_base_model
from dreambooth.sampling.sampler import further_seed, load_pipeline, sample
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.run_plan import make_plan

SMALL, LARGE = CASCADE_DIR / "stage-1", CASCADE_DIR / "stage-2"
PROMPT = "a photo of a red car on the beach"
SUBJECT = {"name": "car", "class_noun": "car", "instance_images": str(subject_dir("coral-car"))}


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    """Both stages as anyone loads them."""
    return IFPipeline.from_pretrained(SMALL), IFSuperResolutionPipeline.from_pretrained(LARGE)


def test_its_name_means_both_stages() -> None:
    first, second = (resolve_base_model("miniature-cascade", scales_up=scales_up) for scales_up in (False, True))
    assert (first.directory, second.directory) == (SMALL, LARGE)
    assert (first.resolution, second.resolution) == (16, 64)
    assert (default_bank("miniature-cascade"), named("auto", "miniature-cascade")) == ("miniature", "miniature")


@pytest.mark.parametrize("without", ["", "super_resolution.base_model=null"])
def test_a_run_trains_its_text_encoder_and_both_stages(without: str) -> None:
    asked = load_config({"base_model": "miniature-cascade", "subject": SUBJECT}, (without,) if without else ())
    plan = make_plan(asked, Resources(cpus=2, gpus=0))
    assert plan.run_text_encoders == ("text_encoder",)
    assert plan.config.picture_side == (16 if without else 64)
    assert [stage.base.directory for stage in plan.stages] == ([SMALL] if without else [SMALL, LARGE])


def test_a_folder_of_its_name_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "miniature-cascade").mkdir()
    config = load_config({"base_model": "miniature-cascade", "subject": SUBJECT})
    assert make_plan(config, Resources(cpus=2, gpus=0)).config.super_resolution.base_model == "miniature-cascade"


def test_plain_diffusers_loads_it_as_float32_without_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = IFPipeline.from_pretrained(SMALL), IFSuperResolutionPipeline.from_pretrained(LARGE)
    assert {part.dtype for part in (first.unet, first.text_encoder, second.unet)} == {torch.float32}
    assert "arning" not in capfd.readouterr().err


def test_plain_diffusers_samples_the_same_picture(plain: tuple[Any, Any]) -> None:
    ours = load_pipeline(SMALL, super_resolution=LARGE)
    [expected] = sample(ours, [PROMPT], [5], num_inference_steps=3, guidance_scale=3.0, dtype=torch.float32)
    small, large = plain
    small.scheduler, large.scheduler = copy.deepcopy(ours.scheduler), copy.deepcopy(ours.super_resolution.scheduler)
    drawn: dict[str, Any] = {}
    for stage, seed, settings in (
        (small, 5, {"guidance_scale": 3.0}),
        (large, further_seed(5), {"guidance_scale": 1.0, "noise_level": 25}),
    ):
        stage.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        drawn["image"] = stage(
            PROMPT, num_inference_steps=3, generator=generator, clean_caption=False, **settings, **drawn
        ).images
    [found] = drawn["image"]
    assert found.size == expected.size == (64, 64)
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1


def test_the_second_stage_sees_the_small_picture_and_no_text(plain: tuple[Any, Any]) -> None:
    stage = load_pipeline(SMALL, super_resolution=LARGE).super_resolution
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "dtype": torch.float32}
    one, other = (Image.linear_gradient("L").resize((16, 16)).rotate(angle).convert("RGB") for angle in (0, 90))
    pictures = [
        np.asarray(sample(stage, [prompt], [0], images=[image], **settings)[0], int)
        for prompt, image in (("a red car", one), ("a blue dog", one), ("a red car", other))
    ]
    assert np.array_equal(pictures[0], pictures[1])
    assert np.abs(pictures[0] - pictures[2]).mean() > 10


def test_its_stages_have_one_text_encoder() -> None:
    one, other = (load_file(stage / "text_encoder" / "model.safetensors") for stage in (SMALL, LARGE))
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_the_measured_quality_meets_its_bounds_and_stands_in_the_card() -> None:
    figures = json.loads((CASCADE_DIR / "quality.json").read_text())
    assert {name: figures[name] for name, bound in BOUNDS.items() if figures[name] < bound} == {}
    card = (CASCADE_DIR / "README.md").read_text()
    rows = {row.split("|")[1].strip(): row for row in card.splitlines() if row.startswith("| ")}
    shown = {
        "class noun": ["prompt_class_noun"],
        "colour": ["prompt_colour"],
        "place": ["prompt_place"],
        "peak signal-to-noise ratio, dB": ["stage_ii_psnr", "bilinear_psnr"],
        "similarity by the ViT": ["stage_ii_vit", "bilinear_vit"],
    }
    for label, names in shown.items():
        cells = [cell.strip() for cell in rows[label].split("|")[2:]]
        assert cells[: len(names)] == [f"{figures[name]:.2f}" for name in names], label
