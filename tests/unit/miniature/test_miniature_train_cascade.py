from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline

from dreambooth.miniature.pretraining.assemble import assemble_cascade
from dreambooth.miniature.pretraining.t5_tokenizer import build_t5_tokenizer
from dreambooth.miniature.pretraining.tokenizer import rare_words
from dreambooth.miniature.pretraining.train_cascade import (
    CROP_SIDE,
    SMALL_SIDE,
    CaptionedPixels,
    build_large_unet,
    build_small_unet,
    build_t5,
    noising_scheduler,
    scheduler,
)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a photo of a red dog", ["▁a", "▁photo", "▁of", "▁a", "▁red", "▁dog"]),
        (f"a {rare_words()[0]} car", ["▁a", f"▁{rare_words()[0]}", "▁car"]),
        ("[v]", ["▁", "[", "v", "]"]),
    ],
)
def test_words_are_single_tokens_and_all_else_is_read_by_characters(text: str, pieces: list[str]) -> None:
    assert build_t5_tokenizer().tokenize(text) == pieces


@pytest.mark.parametrize("side", [SMALL_SIDE, CROP_SIDE])
def test_a_step_always_shows_the_same_scenes(side: int) -> None:
    drawing = CaptionedPixels(stage="test", batch_size=5, side=side)
    (pixels, captions), (again, same) = drawing(3), drawing(3)
    assert pixels.shape == (5, 3, side, side)
    assert np.array_equal(pixels, again)
    assert captions == same
    assert captions != drawing(4)[1]


def test_both_stages_load_in_plain_pipelines_and_follow_each_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    schedulers = scheduler(prediction_type="epsilon"), scheduler(prediction_type="v_prediction"), noising_scheduler()
    assemble_cascade(tmp_path, small=build_small_unet(), large=build_large_unet(), t5=build_t5(), schedulers=schedulers)
    first = IFPipeline.from_pretrained(tmp_path / "stage-1")
    second = IFSuperResolutionPipeline.from_pretrained(tmp_path / "stage-2")
    asked = {"num_inference_steps": 2, "output_type": "pt", "clean_caption": False}
    small = first("a photo of a dog", generator=torch.Generator().manual_seed(0), **asked).images
    large = second(image=small, prompt="a photo of a dog", noise_level=25, **asked).images
    assert small.shape == (1, 3, 16, 16)
    assert large.shape == (1, 3, 64, 64)
    assert {first.unet.dtype, first.text_encoder.dtype, second.unet.dtype} == {torch.float32}
