"""miniature-cascade in the format of DeepFloyd IF: pixels of 16 a side by T5's states, and a stage that scales them up.

Stage I predicts noise, stage II the velocity (arXiv 2202.00512): with noise as its target, stage II stayed worse than
bilinear interpolation in as many steps. Half of what a UNet here puts out is the variance that IF's pipelines expect;
nothing learns it, and samplers take a fixed one.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from dreambooth.miniature.pretraining.ahead import Ahead
from dreambooth.miniature.pretraining.captions import is_held_out_prompt, sample_caption
from dreambooth.miniature.pretraining.drawing import draw
from dreambooth.miniature.pretraining.photographs import to_pixels
from dreambooth.miniature.pretraining.stage import Stage, autocast, fit
from dreambooth.miniature.pretraining.t5_tokenizer import T5_LENGTH, build_t5_tokenizer
from dreambooth.miniature.pretraining.train_unet import CAPTION_DROPOUT, MIN_SNR_GAMMA
from dreambooth.miniature.pretraining.world import Scene, sample_scene
from dreambooth.models.process import Diffusion, SuperResolution

SMALL_STAGE = Stage(name="cascade-small", steps=20_000, minutes=105, learning_rate=1e-3, ema_decay=0.999)
LARGE_STAGE = Stage(name="cascade-large", steps=10_000, minutes=50, learning_rate=1e-3, ema_decay=0.998)
SMALL_SIDE, LARGE_SIDE, CROP_SIDE = 16, 64, 32
SMALL_BATCH, LARGE_BATCH = 32, 16
MOST_NOISE = 400
"""Levels of the small picture's noise that stage II is trained on: from 0 to below this, of 1000."""
TUNED_LEVELS = 100
"""The same of DreamBooth, whose samples have a quarter of this: higher levels leave less of the small picture."""


def scheduler(*, prediction_type: str) -> DDPMScheduler:
    """The noise of both stages, which is that of IF. `variance_type`: no variance is learned."""
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        variance_type="fixed_small",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
        timestep_spacing="linspace",
    )


def noising_scheduler() -> DDPMScheduler:
    """The noise of the small picture, which says how much of it stage II is tuned and sampled with."""
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    noising.register_to_config(_levels=TUNED_LEVELS)
    return noising


def build_small_unet() -> UNet2DConditionModel:
    """An untrained stage I of 4.4 M parameters, for 16 x 16 pixels."""
    unet = UNet2DConditionModel(
        sample_size=SMALL_SIDE,
        in_channels=3,
        out_channels=6,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        encoder_hid_dim=128,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        attention_head_dim=4,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
    )
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def build_large_unet() -> UNet2DConditionModel:
    """An untrained stage II of 1 M parameters without attention, so that crops are as good as whole pictures."""
    unet = UNet2DConditionModel(
        sample_size=LARGE_SIDE,
        in_channels=6,
        out_channels=6,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=128,
        class_embed_type="timestep",
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
    )
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def build_t5() -> T5EncoderModel:
    """An untrained T5 encoder of 0.35 M parameters."""
    tokenizer = build_t5_tokenizer()
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


@dataclass(frozen=True, kw_only=True)
class CaptionedPixels:
    """Fresh scenes of a step, never of a held-out prompt: pixels (B, 3, S, S) and captions."""

    stage: str
    batch_size: int
    side: int

    def __call__(self, step: int) -> tuple[np.ndarray[Any, np.dtype[np.float32]], list[str]]:
        """Pictures and captions of a step, whatever went before it."""
        rng = random.Random(f"{self.stage} {step}")
        scenes = [_scene(rng) for _ in range(self.batch_size)]
        captions = [sample_caption(rng, scene).text for scene in scenes]
        images = [_cut(rng, draw(scene, LARGE_SIDE), self.side) for scene in scenes]
        return to_pixels(images), ["" if rng.random() < CAPTION_DROPOUT else caption for caption in captions]


def _scene(rng: random.Random) -> Scene:
    while is_held_out_prompt(scene := sample_scene(rng)):
        pass
    return scene


def _cut(rng: random.Random, image: Image.Image, side: int) -> Image.Image:
    """Reduced to stage I's pixels, or a crop of stage II's."""
    if side == SMALL_SIDE:
        return image.reduce(LARGE_SIDE // SMALL_SIDE)
    left, top = (4 * rng.randint(0, (LARGE_SIDE - side) // 4) for _ in range(2))
    return image.crop((left, top, left + side, top + side))


def train_small(
    folder: Path, *, device: torch.device, stage: Stage = SMALL_STAGE, drawers: int = 0
) -> tuple[UNet2DConditionModel, T5EncoderModel]:
    """Train stage I's UNet and T5 together, resumably in `folder`."""
    torch.manual_seed(0)
    unet, t5, tokenizer = build_small_unet(), build_t5(), build_t5_tokenizer()
    usual = unet.attn_processors
    unet.set_attn_processor(AttnProcessor())  # faster than fused attention for so few tokens on a CPU
    both = nn.ModuleDict({"unet": unet, "text_encoder": t5}).to(device)
    process = Diffusion.from_scheduler(scheduler(prediction_type="epsilon").alphas_cumprod.to(device), {})

    def loss_at(step: int, progress: float) -> Tensor:
        drawn, captions = batches(step)
        generator = torch.Generator().manual_seed(random.Random(f"cascade noise {step}").getrandbits(40))
        x0 = torch.from_numpy(drawn).to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        timesteps = _stratified_timesteps(len(x0), generator).to(device)
        tokens = tokenizer(captions, padding="max_length", max_length=T5_LENGTH, truncation=True, return_tensors="pt")
        with autocast(device):
            # The UNet sees the states of padding too, as IF's pipelines give them.
            states = t5(tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device)).last_hidden_state
            prediction: Tensor = unet(process.noisy(x0, noise, timesteps), timesteps, states).sample[:, :3].float()
        weight = process.weight(timesteps, min_snr_gamma=MIN_SNR_GAMMA)
        assert weight is not None
        return (weight * F.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3))).mean()

    drawing = CaptionedPixels(stage="cascade", batch_size=SMALL_BATCH, side=SMALL_SIDE)
    with Ahead(drawing, processes=drawers) as batches:
        fit(stage, both, loss_at, folder, save_every_seconds=300)
    unet.set_attn_processor(usual)
    return unet, t5


def train_large(
    folder: Path, *, device: torch.device, stage: Stage = LARGE_STAGE, drawers: int = 0
) -> UNet2DConditionModel:
    """Train stage II, resumably in `folder`, on crops beside their small copies with noise of many levels."""
    torch.manual_seed(0)
    unet = build_large_unet().to(device)
    small = Diffusion.from_scheduler(noising_scheduler().alphas_cumprod[:MOST_NOISE], {})
    process = SuperResolution(
        alphas_cumprod=scheduler(prediction_type="v_prediction").alphas_cumprod,
        prediction_type="v_prediction",
        small=small,
        factor=LARGE_SIDE // SMALL_SIDE,
        levels=MOST_NOISE,
    )

    def loss_at(step: int, progress: float) -> Tensor:
        x0 = torch.from_numpy(batches(step)[0])  # (B, 3, 32, 32)
        generator = torch.Generator().manual_seed(random.Random(f"cascade-large noise {step}").getrandbits(40))
        noise = torch.randn(x0.shape, generator=generator)
        timesteps = _stratified_timesteps(len(x0), generator)
        copies, levels = (
            torch.stack(part) for part in zip(*(process.draw_small(x, generator) for x in x0), strict=True)
        )
        sample = torch.cat([process.noisy(x0, noise, timesteps), copies], dim=1).to(device)
        nothing = sample.new_zeros(len(x0), 1, 128)  # it has no attention to read a text with
        with autocast(device):
            output = unet(sample, timesteps.to(device), nothing, class_labels=levels.to(device)).sample
        target = process.target(x0, noise, timesteps).to(device)
        return F.mse_loss(output[:, :3].float(), target)

    drawing = CaptionedPixels(stage="cascade-large", batch_size=LARGE_BATCH, side=CROP_SIDE)
    with Ahead(drawing, processes=drawers) as batches:
        fit(stage, unet, loss_at, folder, save_every_seconds=300)
    return unet


def _stratified_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Timesteps (count,), one from each of `count` equal slices of the thousand."""
    return ((torch.arange(count) + torch.rand(count, generator=generator)) * 1000 / count).long()
