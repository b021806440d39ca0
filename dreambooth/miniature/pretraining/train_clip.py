"""The miniature's CLIP: learned from batches of near misses, where a caption may be true of several scenes.

Its text tower has the configuration of the pipeline's text encoder, and that one starts from it.
"""

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from dreambooth.miniature.pretraining.ahead import Ahead
from dreambooth.miniature.pretraining.captions import sample_caption, sample_group, truth
from dreambooth.miniature.pretraining.drawing import draw
from dreambooth.miniature.pretraining.photographs import to_pixels
from dreambooth.miniature.pretraining.stage import Stage, autocast, fit
from dreambooth.miniature.pretraining.tokenizer import MAX_LENGTH, build_tokenizer

STAGE = Stage(name="clip", steps=2624, minutes=36, learning_rate=1e-3, weight_decay=0.05, ema_decay=0.995)
GROUPS = 12  # of eight scenes each in a batch


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """The configuration of every text encoder here: 0.4 M parameters."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP of 1 M parameters for 64 x 64 images."""
    vision = CLIPVisionConfig(
        hidden_size=112,
        intermediate_size=336,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=64,
    )
    return CLIPModel(
        CLIPConfig(text_config=text_config(tokenizer).to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    )


def blurred(pixels: Tensor, rng: random.Random) -> Tensor:
    """Images as a generator might make them: softer, noisier, in slightly other colours. (B, 3, H, W), as it was."""
    if rng.random() < 0.6:
        side = rng.randint(24, 56)
        small = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        pixels = F.interpolate(small, size=pixels.shape[-2:], mode="bilinear")
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    if rng.random() < 0.6:
        noise = torch.randn(pixels.shape, generator=generator).to(pixels.device)
        pixels = pixels + rng.uniform(0, 0.12) * noise
    tint = torch.empty(2, len(pixels), 3, 1, 1).uniform_(-0.06, 0.06, generator=generator).to(pixels.device)
    return (pixels * (1 + tint[0]) + tint[1]).clamp(-1, 1)


def captioned_scenes(step: int) -> tuple[Any, list[str], Tensor]:
    """A batch: pixels (B, 3, 64, 64), captions, and which is true of which, (captions, scenes)."""
    rng = random.Random(f"clip {step}")
    scenes = [scene for _ in range(GROUPS) for scene in sample_group(rng)]
    captions = [sample_caption(rng, scene) for scene in scenes]
    pixels = to_pixels([draw(scene) for scene in scenes])
    return pixels, [caption.text for caption in captions], truth(captions, scenes)


def train_clip(folder: Path, *, device: torch.device, stage: Stage = STAGE, drawers: int = 0) -> CLIPModel:
    """Train the CLIP, resumably in `folder`."""
    tokenizer = build_tokenizer()
    clip = build_clip(tokenizer).to(device)
    clip.set_attn_implementation("eager")  # twice as fast as fused attention for so few tokens on a CPU

    def loss_at(step: int, progress: float) -> Tensor:
        drawn, captions, true = batches(step)
        pixels = blurred(torch.from_numpy(drawn).to(device), random.Random(f"clip blur {step}"))
        tokens = tokenizer(captions, padding=True, return_tensors="pt").to(device)
        with autocast(device):
            output = clip(input_ids=tokens.input_ids, pixel_values=pixels)
        logits = output.logits_per_text.float()  # (captions, scenes), temperature applied
        matches = true.to(device)
        by_text = F.cross_entropy(logits, matches / matches.sum(1, keepdim=True))
        by_image = F.cross_entropy(logits.T, matches.T / matches.T.sum(1, keepdim=True))
        return (by_text + by_image) / 2

    with Ahead(captioned_scenes, processes=drawers) as batches:
        fit(stage, clip, loss_at, folder)
    return clip
