import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, ViTModel

from dreambooth.miniature import CASCADE_DIR, CLIP_DIR, FLOW_DIR, PIPELINE_DIR, VIT_DIR, WEIGHTS_DIR
from dreambooth.miniature.pretraining.quality import BOUNDS, verification_auc


@pytest.mark.parametrize(
    ("folder", "most"), [(FLOW_DIR, 15_000_000), (CASCADE_DIR, 15_000_000), (WEIGHTS_DIR, 37_000_000)]
)
def test_the_weights_are_small(folder: Path, most: int) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= most


def test_no_configuration_names_the_folder_that_a_part_came_from() -> None:
    configurations = list(WEIGHTS_DIR.rglob("config.json"))
    assert len(configurations) > 8
    assert [path for path in configurations if "_name_or_path" in json.loads(path.read_text())] == []


def test_the_measured_quality_meets_its_bounds() -> None:
    figures = json.loads((WEIGHTS_DIR / "quality.json").read_text())
    assert {name: figures[name] for name, bound in BOUNDS.items() if figures[name] < bound} == {}


def test_the_pipeline_loads_as_float32_without_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE_DIR)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    assert "arning" not in capfd.readouterr().err


def test_the_parts_load_on_their_own() -> None:
    assert CLIPTextModel.from_pretrained(PIPELINE_DIR, subfolder="text_encoder").dtype == torch.float32
    assert CLIPTokenizer.from_pretrained(PIPELINE_DIR, subfolder="tokenizer").model_max_length == 24
    assert DDPMScheduler.from_pretrained(PIPELINE_DIR, subfolder="scheduler").config.prediction_type == "epsilon"
    assert ViTModel.from_pretrained(VIT_DIR, add_pooling_layer=False).dtype == torch.float32
    assert CLIPModel.from_pretrained(CLIP_DIR).dtype == torch.float32


@pytest.mark.parametrize("folder", [VIT_DIR, CLIP_DIR])
def test_the_image_processor_says_size_mean_and_standard_deviation(folder: object) -> None:
    processor = json.loads((VIT_DIR / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == processor["image_std"] == [0.5, 0.5, 0.5]
    assert 64 in processor["size"].values()


def test_a_prompt_gives_images_and_a_seed_the_same_ones() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE_DIR)
    pipeline.set_progress_bar_config(disable=True)
    first, second = (
        pipeline(
            "a photo of a red car", num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="np"
        ).images
        for _ in range(2)
    )
    assert first.shape == (1, 64, 64, 3)
    assert (first == second).all()


def test_verification_auc_knows_perfect_and_hopeless_embeddings() -> None:
    subjects, groups = [0, 0, 1, 1], ["dog"] * 4
    perfect = torch.eye(2)[[0, 0, 1, 1]]
    assert verification_auc(perfect, subjects, groups) == 1.0
    assert verification_auc(torch.eye(2)[[0, 1, 0, 1]], subjects, groups) == 0.0
