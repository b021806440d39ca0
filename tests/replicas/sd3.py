"""stable-diffusion-3.5-medium and stable-diffusion-3-medium: rectified flow of shift 3, three text encoders."""

from pathlib import Path
from typing import Any

import torch

from replicas.parts import (
    autoencoder_without_quantization,
    clip_text,
    save,
    t5_encoder,
    write_clip_tokenizer,
    write_index,
    write_t5_tokenizer,
)

# After `parts`, which silences their notices.
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel  # isort: skip
from transformers import CLIPTextModelWithProjection  # isort: skip

_PARTS: dict[str, str | None] = {
    "scheduler": "diffusers.FlowMatchEulerDiscreteScheduler",
    "text_encoder": "transformers.CLIPTextModelWithProjection",
    "text_encoder_2": "transformers.CLIPTextModelWithProjection",
    "text_encoder_3": "transformers.T5EncoderModel",
    "tokenizer": "transformers.CLIPTokenizer",
    "tokenizer_2": "transformers.CLIPTokenizer",
    "tokenizer_3": "transformers.T5TokenizerFast",
    "transformer": "diffusers.SD3Transformer2DModel",
    "vae": "diffusers.AutoencoderKL",
}


def build(folder: Path) -> None:
    """Stable Diffusion 3.5."""
    _write_common(folder, dual_attention_layers=(0, 1), qk_norm="rms_norm")
    ids = write_t5_tokenizer(folder / "tokenizer_3")
    save(folder, text_encoder_3=t5_encoder(48, ids))
    write_index(folder, "StableDiffusion3Pipeline", _PARTS)


def build_without_t5(folder: Path) -> None:
    """Stable Diffusion 3 without its third text encoder, as it is often kept for its memory."""
    _write_common(folder)
    write_index(folder, "StableDiffusion3Pipeline", _PARTS | {"text_encoder_3": None, "tokenizer_3": None})


def _write_common(folder: Path, **settings: Any) -> None:
    first = write_clip_tokenizer(folder / "tokenizer")
    second = write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    text_encoder = clip_text(CLIPTextModelWithProjection, 16, first, activation="quick_gelu")
    torch.nn.init.eye_(text_encoder.text_projection.weight)  # as in the published ones
    save(
        folder,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=48,
            caption_projection_dim=32,
            pooled_projection_dim=16 + 20,
            pos_embed_max_size=12,
            **settings,
        ),
        vae=autoencoder_without_quantization(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=text_encoder,
        text_encoder_2=clip_text(CLIPTextModelWithProjection, 24, second, activation="gelu", projection=20),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
    )
