"""Sampling with less arithmetic gives the samples that plain diffusers gives, and leaves the denoiser as it was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dreambooth.models.families.computed_once import computed_once
from dreambooth.sampling.sampler import load_pipeline, sample


@pytest.fixture(params=["plain first block", "text in the first block"])
def pipeline(request: pytest.FixtureRequest, tiny_pipeline: Path) -> Any:
    made = load_pipeline(tiny_pipeline, device="cpu", dtype=torch.float32)
    if request.param == "text in the first block":
        blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        torch.manual_seed(0)
        made.unet = type(made.unet).from_config({**made.unet.config, **blocks})
    return made


def latents(pipeline: Any, guidance_scale: float) -> Tensor:
    sampled: Tensor = pipeline(
        ["a photo of a car", "a photo of a dog on the beach"],
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        output_type="latent",
    ).images
    return sampled


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_the_samples_are_those_of_diffusers(pipeline: Any, guidance_scale: float) -> None:
    plain = latents(pipeline, guidance_scale)
    with computed_once(pipeline.unet, guided=guidance_scale > 1):
        once = latents(pipeline, guidance_scale)
        again = latents(pipeline, guidance_scale)
    torch.testing.assert_close(once, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, once)


class Rows(TorchFunctionMode):
    """How many rows each layer is given, by the layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, list[int]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (functional.linear, functional.conv2d):
            self.of.setdefault(id(args[1]), []).append(len(args[0]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_pictures_of_several_prompts_are_those_of_diffusers(pipeline: Any, guidance_scale: float) -> None:
    prompts = ["a photo of a car", "a photo of a dog", "a photo of a car"]
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": guidance_scale}
    images = sample(pipeline, prompts, [1, 2, 3], batch_size=2, dtype=torch.float32, **settings)
    for prompt, seed, image in zip(prompts, (1, 2, 3), images, strict=True):
        [plain] = pipeline([prompt], generator=[torch.Generator().manual_seed(seed)], **settings).images
        apart = np.abs(np.asarray(image, np.int16) - np.asarray(plain, np.int16))
        assert apart.max() <= 1  # by rounding


def test_less_is_computed(pipeline: Any) -> None:
    with computed_once(pipeline.unet, guided=True), Rows() as rows:
        latents(pipeline, 4.0)
    text = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    assert rows.of[id(pipeline.unet.conv_in.weight)] == [2, 2, 2]
    assert rows.of[id(pipeline.unet.down_blocks[0].resnets[0].conv1.weight)] == [2, 2, 2]
    assert rows.of[id(text.to_q.weight)] == [4, 4, 4]
    assert rows.of[id(text.to_k.weight)] == rows.of[id(text.to_v.weight)] == [4]


def test_the_denoiser_is_left_as_it_was(pipeline: Any) -> None:
    with pytest.raises(KeyboardInterrupt), computed_once(pipeline.unet, guided=True):
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in pipeline.unet.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipeline.unet.modules())
