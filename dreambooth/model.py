"""Denoiser and text encoder in one module, so that one engine trains both and ZeRO shards both."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from dreambooth.config import DreamBoothConfig
from dreambooth.families import Family, family_of
from dreambooth.losses import Losses, NoiseSchedule, prior_preservation_loss
from dreambooth.quiet import hide_progress_bars


class DreamBoothModel(nn.Module):
    """All that is fine-tuned, and the loss.

    `text_encoder` None means that text embeddings are given instead of token ids. Parameters stay in fp32; with
    `autocast` the matrix products run in bf16, so an update of 5e-6 is not rounded away as it would be in bf16 weights.
    """

    def __init__(
        self,
        *,
        family: Family,
        denoiser: nn.Module,
        text_encoder: nn.Module | None,
        schedule: NoiseSchedule,
        prior_loss_weight: float,
        min_snr_gamma: float | None = None,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.text_encoder = text_encoder
        self.family = family
        self.schedule = schedule
        self.prior_loss_weight = prior_loss_weight
        self.min_snr_gamma = min_snr_gamma
        self.autocast = autocast

    def forward(self, latents: Tensor, noise: Tensor, timesteps: Tensor, text: Tensor) -> Losses:
        """Losses of a `Batch`: instance half first, class half second, both through one pass."""
        noisy_latents = self.schedule.noisy_latents(latents, noise, timesteps)
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.autocast):
            encoder_hidden_states = (
                text if self.text_encoder is None else self.family.encode_text(self.text_encoder, text)
            )
            model_pred = self.family.denoise(self.denoiser, noisy_latents, timesteps, encoder_hidden_states)
        weight = None if self.min_snr_gamma is None else self.schedule.min_snr_weight(timesteps, self.min_snr_gamma)
        return prior_preservation_loss(
            model_pred,
            self.schedule.target(latents, noise, timesteps),
            prior_loss_weight=self.prior_loss_weight,
            weight=weight,
        )


def load_schedule(directory: Path) -> NoiseSchedule:
    """The noise schedule that a base model was trained with."""
    scheduler = DDPMScheduler.from_pretrained(directory, subfolder="scheduler", local_files_only=True)
    return NoiseSchedule.from_scheduler(scheduler.alphas_cumprod, scheduler.config)


def load_model(directory: Path, config: DreamBoothConfig, *, autocast: bool = False) -> DreamBoothModel:
    """Load what a run trains from a diffusers directory: the denoiser, and the text encoder unless it stays frozen."""
    hide_progress_bars()
    family = family_of(directory)
    denoiser = family.load_denoiser(directory)
    text_encoder = family.load_text_encoder(directory) if config.train.train_text_encoder else None
    if config.train.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        if text_encoder is not None:
            text_encoder.activation_checkpointing_enable()  # type: ignore[operator]
    model = DreamBoothModel(
        family=family,
        denoiser=denoiser,
        text_encoder=text_encoder,
        schedule=load_schedule(directory),
        prior_loss_weight=config.prior.prior_loss_weight,
        min_snr_gamma=config.train.min_snr_gamma,
        autocast=autocast,
    )
    return model.train().requires_grad_(True)
