"""A training step on tensors without data, to count its cost for a base model of any size."""

from pathlib import Path

import torch
from torch import Tensor

from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.families import family_of
from dreambooth.models.families.stable_diffusion import load_tokenizer


class EmptyStep:
    """Denoiser and text encoder in training mode and a batch of `images` images, as shapes alone.

    On the meta device, or on a real one under FakeTensorMode.
    """

    def __init__(
        self,
        directory: Path,
        *,
        resolution: int,
        images: int,
        train_text_encoder: bool,
        checkpointing: bool,
        device: str = "meta",
    ) -> None:
        self._family = family_of(directory)
        self.denoiser, self.text_encoder = self._family.empty_components(directory, device=device)
        if checkpointing:
            self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
            self.text_encoder.activation_checkpointing_enable()  # type: ignore[operator]
        self.denoiser.train()
        self.text_encoder.train().requires_grad_(train_text_encoder)
        with torch.device(device):
            self._latents = torch.empty(images, *latent_shape(directory, resolution))
            self._timesteps = torch.zeros(images, dtype=torch.long)
            self._input_ids = torch.zeros(images, load_tokenizer(directory).model_max_length, dtype=torch.long)

    def model_pred(self) -> Tensor:
        """The forward pass: (images, C, H, W)."""
        text = self._family.encode_text(self.text_encoder, self._input_ids)
        return self._family.denoise(self.denoiser, self._latents, self._timesteps, text)


def latent_shape(directory: Path, resolution: int) -> tuple[int, int, int]:
    """(C, H, W) of the latent of an image of `resolution` pixels."""
    settings = BaseSettings(directory)
    side = resolution // settings.downscaling
    return settings["unet.in_channels"], side, side
