"""What does a training step cost? Counted on shapes alone, so it takes a second whatever the size of the base model."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from dreambooth.families import family_of
from dreambooth.families.stable_diffusion import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Of one micro step of `pairs` pairs: floating-point operations (a multiply-add is two) forward and with the
    backward pass.
    """

    forward_flops: int
    flops: int


@cache
def step_cost(
    directory: Path, *, resolution: int, pairs: int, train_text_encoder: bool, checkpointing: bool
) -> StepCost:
    """Run a step of `pairs` instance/class pairs on the meta device, in fp32, and count.

    With gradient checkpointing, the second forward pass is counted too.
    """
    family = family_of(directory)
    denoiser, text_encoder = family.empty_components(directory)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    with torch.device("meta"):
        latents = torch.empty(2 * pairs, *latent_shape(directory, resolution))
        timesteps = torch.zeros(2 * pairs, dtype=torch.long)
        input_ids = torch.zeros(2 * pairs, load_tokenizer(directory).model_max_length, dtype=torch.long)
    denoiser.train()
    text_encoder.train().requires_grad_(train_text_encoder)
    counter = FlopCounterMode(display=False)
    with counter:
        text = family.encode_text(text_encoder, input_ids)
        loss = family.denoise(denoiser, latents, timesteps, text).sum()
        forward = counter.get_total_flops()
        loss.backward()
    return StepCost(forward_flops=forward, flops=counter.get_total_flops())


def latent_shape(directory: Path, resolution: int) -> tuple[int, int, int]:
    """(C, H, W) of the latent of an image of `resolution` pixels."""
    scale = 2 ** (len(json.loads((directory / "vae" / "config.json").read_text())["block_out_channels"]) - 1)
    channels = json.loads((directory / "unet" / "config.json").read_text())["in_channels"]
    return channels, resolution // scale, resolution // scale
