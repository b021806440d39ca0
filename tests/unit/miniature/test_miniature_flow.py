"""miniature-flow as it is shipped: what plain diffusers makes of it, and what the pipeline does."""

import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from dreambooth.evaluation.banks import default_bank
from dreambooth.evaluation.protocol import named
from dreambooth.miniature import CLIP_DIR, FLOW_DIR
from dreambooth.miniature.pretraining.quality_flow import BOUNDS
from dreambooth.models.base_model import resolve_base_model
from dreambooth.sampling.sampler import load_pipeline, sample

PROMPT = "a photo of a red car on the beach"


def test_it_is_found_by_its_name_and_measured_as_the_miniature() -> None:
    base = resolve_base_model("miniature-flow")
    assert base.directory == FLOW_DIR / "pipeline"
    assert base.family.name == "Stable Diffusion 3 and 3.5"
    assert base.resolution == 64
    assert (default_bank("miniature-flow"), named("auto", "miniature-flow")) == ("miniature", "miniature")


def test_plain_diffusers_loads_it_as_float32_without_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = StableDiffusion3Pipeline.from_pretrained(FLOW_DIR / "pipeline")
    parts = pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3
    assert {part.dtype for part in parts} == {torch.float32}
    assert "arning" not in capfd.readouterr().err


def test_plain_diffusers_samples_the_same_picture() -> None:
    plain = StableDiffusion3Pipeline.from_pretrained(FLOW_DIR / "pipeline")
    plain.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0}
    theirs = plain(PROMPT, generator=torch.Generator().manual_seed(5), **settings).images[0]
    ours = sample(load_pipeline(FLOW_DIR / "pipeline"), [PROMPT], [5], dtype=torch.float32, **settings)[0]
    assert theirs.size == (64, 64)
    assert np.abs(np.asarray(theirs, int) - np.asarray(ours, int)).max() <= 1


def test_t5_says_nothing() -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(FLOW_DIR / "pipeline")
    with torch.no_grad():
        states, *_ = pipeline.encode_prompt(PROMPT, None, None, do_classifier_free_guidance=False)
    assert states.shape == (1, 24 + 256, 192)
    assert states[:, 24:].count_nonzero() == 0
    assert states[:, :24].std() > 1


def test_its_text_encoders_are_the_miniatures() -> None:
    from safetensors.torch import load_file

    clip = load_file(CLIP_DIR / "model.safetensors")
    second = load_file(FLOW_DIR / "pipeline" / "text_encoder_2" / "model.safetensors")
    assert second
    assert all(torch.equal(clip[name], weight) for name, weight in second.items())


def test_the_measured_quality_meets_its_bounds() -> None:
    figures = json.loads((FLOW_DIR / "quality.json").read_text())
    assert {name: figures[name] for name, bound in BOUNDS.items() if figures[name] < bound} == {}
