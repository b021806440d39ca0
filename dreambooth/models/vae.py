"""The VAE of a base model."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL


def load_vae(directory: Path, device: str) -> AutoencoderKL:
    """The frozen VAE of a pipeline directory, in fp32: some SD VAEs overflow in fp16."""
    vae = AutoencoderKL.from_pretrained(
        directory, subfolder="vae", dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    return vae.to(device).requires_grad_(False).eval()
