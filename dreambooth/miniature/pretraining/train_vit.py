"""The miniature's ViT: two views of one subject should look alike to it, and different subjects should not.

It is to judge a generator's pictures, so its views are as such pictures are: blurred, noisy, off in colour and a little
out of shape. What is left to go by is identity: class, colours, pattern, proportions.
"""

import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTConfig, ViTModel

from dreambooth.miniature.pretraining.ahead import Ahead
from dreambooth.miniature.pretraining.drawing import draw
from dreambooth.miniature.pretraining.photographs import Photographs, to_pixels
from dreambooth.miniature.pretraining.stage import Stage, autocast, fit
from dreambooth.miniature.pretraining.train_clip import blurred
from dreambooth.miniature.pretraining.world import CLASS_NOUNS, sample_look, sample_scene

STAGE = Stage(name="vit", steps=1269, minutes=28, learning_rate=1e-3, weight_decay=0.05, ema_decay=0.995)
ONE_CLASS, ANY_CLASS, PHOTOGRAPHED = 24, 18, 6  # subjects of a batch, two views each
TEMPERATURE = 0.1


def build_vit() -> ViTModel:
    """An untrained ViT of 0.5 M parameters for 64 x 64 images."""
    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        image_size=64,
        patch_size=8,
    )
    return ViTModel(config, add_pooling_layer=False)


def warped(pixels: Tensor, rng: random.Random) -> Tensor:
    """Images bent smoothly, by two or three pixels at most. (B, 3, H, W) -> the same shape."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    count, _, height, width = pixels.shape
    coarse = torch.empty(count, 2, 5, 5).uniform_(-0.08, 0.08, generator=generator).to(pixels.device)
    shift = F.interpolate(coarse, size=(height, width), mode="bicubic").permute(0, 2, 3, 1)  # (B, H, W, 2)
    identity = torch.eye(2, 3, device=pixels.device).expand(count, 2, 3)
    grid = F.affine_grid(identity, [count, 3, height, width], align_corners=False) + shift
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def sample_pairs(photographs: Photographs, step: int) -> Any:
    """Two views of each subject of a batch, all first views, then all second ones: pixels (B, 3, 64, 64)."""
    rng = random.Random(f"vit {step}")
    class_noun = rng.choice(CLASS_NOUNS)
    looks = [sample_look(rng, class_noun) for _ in range(ONE_CLASS)] + [sample_look(rng) for _ in range(ANY_CLASS)]
    subjects = rng.sample(tuple(photographs.by_subject), min(PHOTOGRAPHED, len(photographs.by_subject)))
    views = []
    for _ in range(2):
        views += [draw(sample_scene(rng, look, photo=rng.random() < 0.9)) for look in looks]
        views += [photographs.crop(rng, subject, smallest=0.6) for subject in subjects]
    return to_pixels(views)


def embed(vit: ViTModel, pixels: Tensor) -> Tensor:
    """The normalised class-token embeddings of (B, 3, 64, 64) images from -1 to 1: (B, 96)."""
    return F.normalize(vit(pixels).last_hidden_state[:, 0].float(), dim=-1)


def train_vit(
    folder: Path, photographs: Photographs, *, device: torch.device, stage: Stage = STAGE, drawers: int = 0
) -> ViTModel:
    """Train the ViT, resumably in `folder`."""
    vit = build_vit().to(device)
    vit.set_attn_implementation("eager")  # twice as fast as fused attention for so few tokens on a CPU

    def loss_at(step: int, progress: float) -> Tensor:
        rng = random.Random(f"vit blur {step}")
        pixels = torch.from_numpy(pairs(step)).to(device)
        pixels = torch.cat([blurred(warped(half, rng), rng) for half in pixels.chunk(2)])
        with autocast(device):
            first, second = embed(vit, pixels).chunk(2)
        logits = first @ second.T / TEMPERATURE
        subjects = torch.arange(len(logits), device=device)
        return (F.cross_entropy(logits, subjects) + F.cross_entropy(logits.T, subjects)) / 2

    with Ahead(partial(sample_pairs, photographs), processes=drawers) as pairs:
        fit(stage, vit, loss_at, folder)
    return vit
