"""The miniature's autoencoder: 64 x 64 RGB to 4 x 16 x 16 latents and back, learned from scenes and photographs.

After the first stage it is refined. Its latents hardly move in that, so a denoiser that learned them fits them still.
"""

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from dreambooth.miniature.pretraining.ahead import Ahead
from dreambooth.miniature.pretraining.drawing import draw
from dreambooth.miniature.pretraining.photographs import Photographs, to_pixels
from dreambooth.miniature.pretraining.stage import Stage, autocast, fit
from dreambooth.miniature.pretraining.world import sample_scene

STAGE = Stage(name="vae", steps=4133, minutes=42, learning_rate=2e-3, weight_decay=0.0, ema_decay=0.998)
REFINE_STAGE = Stage(name="refine", steps=2847, minutes=52, learning_rate=1e-3, weight_decay=0.0, ema_decay=0.998)
BATCH_SIZE = 16
MOST_CROPS, CROPS = 6, 3
"""Photographs of a batch at first, when they teach the most, and later."""


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder of 0.65 M parameters."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What a step of a stage may show: crops of photographs, if there are any, and scenes."""

    stage: str
    photographs: Photographs
    crops: int

    def __call__(self, step: int) -> tuple[np.ndarray[Any, np.dtype[np.float32]], ...]:
        """(crops or 0, 3, 64, 64) and (scenes, 3, 64, 64): as many as a batch has at most."""
        rng = random.Random(f"{self.stage} {step}")
        crops = [self.photographs.crop(rng) for _ in range(self.crops)] if self.photographs.by_subject else []
        scenes = [draw(sample_scene(rng)) for _ in range(BATCH_SIZE - (min(self.crops, CROPS) if crops else 0))]
        return to_pixels(crops) if crops else np.empty((0, 3, 64, 64), np.float32), to_pixels(scenes)


def train_vae(
    folder: Path, photographs: Photographs, *, device: torch.device, stage: Stage = STAGE, drawers: int = 0
) -> AutoencoderKL:
    """Train the autoencoder, resumably in `folder`, and set its scaling factor from the latents of fresh scenes."""
    vae = build_vae().to(device)

    def loss_at(step: int, progress: float) -> Tensor:
        crops, scenes = pictures(step)
        crops = crops[: MOST_CROPS if progress < 0.3 else CROPS]
        pixels = torch.from_numpy(np.concatenate([crops, scenes])[:BATCH_SIZE]).to(device)  # (B, 3, 64, 64)
        with autocast(device):
            posterior = vae.encode(pixels).latent_dist
            # Sampling from the first step on would drown the little that the latents say then.
            latents = posterior.mode() if step < 400 else posterior.sample()
            reconstruction: Tensor = vae.decode(latents).sample.float()
        error = reconstruction - pixels
        divergence: Tensor = (
            0.5 * (posterior.mean.float() ** 2 + posterior.logvar.float().exp() - 1 - posterior.logvar.float()).mean()
        )
        # Once the latents have found their scale, details are worth more than a little regularity.
        weight = 1e-3 if progress < 0.5 else 3e-4
        square = 1.0 if progress < 0.67 else 3.0
        return error.abs().mean() + square * (error**2).mean() + 0.5 * _edges(error) + weight * divergence

    with Ahead(Pictures(stage="vae", photographs=photographs, crops=MOST_CROPS), processes=drawers) as pictures:
        fit(stage, vae, loss_at, folder)
    set_scaling_factor(vae, device)
    return vae


def refine_vae(
    folder: Path,
    vae: AutoencoderKL,
    photographs: Photographs,
    *,
    device: torch.device,
    stage: Stage = REFINE_STAGE,
    drawers: int = 0,
) -> AutoencoderKL:
    """Train the autoencoder on, resumably in `folder`, for its PSNR, with latents that stay about the same."""
    vae = vae.to(device)
    frozen = copy.deepcopy(vae).eval().requires_grad_(False)

    def loss_at(step: int, progress: float) -> Tensor:
        pixels = torch.from_numpy(np.concatenate(pictures(step))).to(device)  # (B, 3, 64, 64)
        with autocast(device):
            with torch.no_grad():
                wanted = frozen.encode(pixels).latent_dist
            posterior = vae.encode(pixels).latent_dist
            error: Tensor = vae.decode(posterior.sample()).sample.float() - pixels
        # A tenth of the latents' standard deviation costs as much as a loss of half a decibel.
        moved: Tensor = F.mse_loss(posterior.mean.float(), wanted.mean.float()) * vae.config.scaling_factor**2
        spread = F.mse_loss(posterior.logvar.float(), wanted.logvar.float())
        return error.abs().mean() + 0.1 * (error**2).mean((1, 2, 3)).log().mean() + moved + 0.01 * spread

    with Ahead(Pictures(stage="refine", photographs=photographs, crops=CROPS), processes=drawers) as pictures:
        fit(stage, vae, loss_at, folder)
    return vae


def _edges(error: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring errors: lines come out sharp."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


@torch.no_grad()
def set_scaling_factor(vae: nn.Module, device: torch.device) -> None:
    """Make scaling_factor the inverse of the latents' standard deviation over fresh scenes."""
    rng = random.Random("scaling factor")
    pixels = torch.from_numpy(to_pixels([draw(sample_scene(rng)) for _ in range(512)])).to(device)
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels.split(64)])  # type: ignore[operator]
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))  # type: ignore[operator]
    means = ", ".join(f"{mean:.2f}" for mean in latents.mean((0, 2, 3)))
    print(f"latents: mean {latents.mean():.3f} (by channel {means}), standard deviation {latents.std():.3f}")
