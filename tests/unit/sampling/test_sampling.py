"""Pictures are those that diffusers' own pipeline makes of the same texts and noise, whatever is special in a base."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from processor import multiplies_bf16
from served import Served

from dreambooth.data.images import to_pixels
from dreambooth.data.latents import encode_latents
from dreambooth.models.families.stable_diffusion import StableDiffusion
from dreambooth.sampling.best_dtype import best_dtype
from dreambooth.sampling.class_images import PriorPlan, generate_block
from dreambooth.sampling.sampler import _decode, load_pipeline, personalized, sample

PROMPTS = ["a photo of a car", "a photo of a dog on the beach"]
FAMILY = StableDiffusion()
SETTINGS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0}


@pytest.fixture
def base(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def shifted(base: Path) -> None:
    change(base / "vae" / "config.json", shift_factor=0.6)


def distilled(base: Path) -> None:
    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(base / "unet")
    UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 8}).save_pretrained(base / "unet")


def named_and_not_there(base: Path) -> None:
    change(
        base / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        requires_safety_checker=True,
    )


def named_and_damaged(base: Path) -> None:
    named_and_not_there(base)
    for part in ("safety_checker", "feature_extractor", "image_encoder"):
        (base / part).mkdir()
        (base / part / "config.json").write_text("{")


def as_it_is(base: Path) -> None:
    pass


KINDS = [as_it_is, shifted, distilled, named_and_not_there, named_and_damaged]


def in_plain_diffusers(base: Path) -> list[npt.NDArray[np.int16]]:
    """Pictures by the pipeline that diffusers loads, which knows of no shift: so decoded by hand."""
    without = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    pipeline = StableDiffusionPipeline.from_pretrained(base, **without, local_files_only=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for place, prompt in enumerate(PROMPTS):
        noise = torch.Generator().manual_seed(place)
        latents = pipeline([prompt], generator=noise, output_type="latent", **SETTINGS).images
        scale, shift = pipeline.vae.config.scaling_factor, pipeline.vae.config.shift_factor or 0.0
        with torch.no_grad():
            decoded = pipeline.vae.decode(latents / scale + shift).sample
        pictures += pipeline.image_processor.postprocess(decoded)
    return [np.asarray(picture, dtype=np.int16) for picture in pictures]


def furthest(pictures: Any, others: list[npt.NDArray[np.int16]]) -> int:
    pairs = zip(pictures, others, strict=True)
    return max(int(np.abs(np.asarray(one, dtype=np.int16) - other).max()) for one, other in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_diffusers(kind: Any, base: Path) -> None:
    kind(base)
    plain = in_plain_diffusers(base)
    pipeline = load_pipeline(base, device="cpu", dtype=torch.float32)
    assert furthest(sample(pipeline, PROMPTS, [0, 1], dtype=torch.float32, **SETTINGS), plain) <= 1  # by rounding


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_that_shares_its_base_draws_the_same(kind: Any, base: Path, tiny_pipeline: Path) -> None:
    kind(base)
    shared = personalized(load_pipeline(base, device="cpu", dtype=torch.float32), base)
    alone = load_pipeline(base, device="cpu", dtype=torch.float32)
    pictures = [sample(one, PROMPTS, [0, 1], dtype=torch.float32, **SETTINGS) for one in (shared, alone)]
    assert furthest(pictures[0], [np.asarray(picture, dtype=np.int16) for picture in pictures[1]]) == 0
    assert shared.scheduler is not alone.scheduler
    assert shared.scheduler.config == alone.scheduler.config


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # older versions know no other name
@pytest.mark.parametrize("kind", [as_it_is, shifted, distilled])
def test_the_served_model_draws_the_same(kind: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multiplies_bf16(monkeypatch, False)
    kind(base)
    assert furthest(Served(base).pictures(PROMPTS, seed=0, **SETTINGS), in_plain_diffusers(base)) <= 1


def test_what_is_encoded_is_decoded_to_itself(base: Path) -> None:
    """Training brings pictures to the denoiser's scale as sampling brings them back from it."""
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    plain = load_pipeline(base, device="cpu", dtype=torch.float32)
    shifted(base)
    with_shift = load_pipeline(base, device="cpu", dtype=torch.float32)
    decoded = []
    for pipeline in (plain, with_shift):
        latents = encode_latents(FAMILY, pipeline.vae, to_pixels([picture])).mean
        decoded += _decode(FAMILY, pipeline, latents)
    assert furthest([decoded[0]], [np.asarray(decoded[1], dtype=np.int16)]) <= 1
    assert FAMILY.load_vae(base, "cpu").config.shift_factor == 0.6


def test_the_best_dtype_is_what_pytorch_says_of_this_processor() -> None:
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert best_dtype("cpu") == ("bfloat16" if native else "float32")
    assert best_dtype("cuda") == "float16"


class _Full:
    """A denoiser's hook that has memory for two pictures, with and without text."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, module: Any, arguments: tuple[Any, ...], named: Any) -> None:
        self.rows.append(len(arguments[0]))
        if len(arguments[0]) > 4:
            raise torch.OutOfMemoryError("out of memory")


def test_a_batch_that_does_not_fit_is_made_smaller(tiny_pipeline: Path) -> None:
    pipeline, full = load_pipeline(tiny_pipeline, device="cpu", dtype=torch.float32), _Full()
    prompts = [*PROMPTS, *PROMPTS, PROMPTS[0]]
    plain = sample(pipeline, prompts, range(5), batch_size=2, dtype=torch.float32, **SETTINGS)
    pipeline.unet.register_forward_pre_hook(full, with_kwargs=True)
    found = sample(pipeline, prompts, range(5), batch_size=5, dtype=torch.float32, **SETTINGS)
    assert [image.tobytes() for image in found] == [image.tobytes() for image in plain]
    assert full.rows == [10, 6, 4, 4, 4, 4, 2, 2]  # five, three, two and again, and the last


def test_class_images_are_no_others_where_memory_is_short(tiny_pipeline: Path) -> None:
    pipeline, full = load_pipeline(tiny_pipeline, device="cpu", dtype=torch.float32), _Full()
    pipeline.unet.register_forward_pre_hook(full, with_kwargs=True)
    plan = PriorPlan(
        base_hash="0" * 16,
        class_prompt=PROMPTS[0],
        resolution=32,
        batch_size=8,
        seed=0,
        dtype="float32",
        sampler="dpm-solver++",
        count=8,
        **SETTINGS,
    )
    with pytest.raises(torch.OutOfMemoryError, match=r"8 class images at once .* set prior\.batch_size to 4: out of"):
        generate_block(pipeline, plan, range(8))
    assert full.rows == [16]
