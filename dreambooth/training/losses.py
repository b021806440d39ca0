"""The prior-preservation loss (Ruiz et al., arXiv 2208.12242, section 3.2) as pure functions of tensors.

The paper writes, with x the instance half and x_pr the class half:

    E[ w_t ||x̂(a_t x + s_t ε, c) - x||² + lambda w_t' ||x̂(a_t' x_pr + s_t' ε', c_pr) - x_pr||² ]

`prior_loss_weight` is its lambda. Latent diffusion predicts noise or velocity instead of x, which is the same loss
under another weight w_t. Noise is an argument everywhere, so tests can be exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dreambooth.errors import InputError

PredictionType = Literal["epsilon", "v_prediction"]


class Losses(NamedTuple):
    """Scalars: total = instance + prior_loss_weight * prior."""

    total: Tensor
    instance: Tensor
    prior: Tensor


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The forward process: alphas_cumprod (T,) in fp32, and the denoiser's prediction type."""

    alphas_cumprod: Tensor
    prediction_type: PredictionType

    @classmethod
    def from_scheduler(cls, alphas_cumprod: Tensor, config: Mapping[str, object]) -> "NoiseSchedule":
        """The schedule of a diffusers scheduler. Raises InputError if it predicts neither noise nor velocity."""
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(
                f"the base model's scheduler has prediction_type {prediction_type!r}; supported: epsilon, v_prediction"
            )
        return cls(alphas_cumprod=alphas_cumprod.float(), prediction_type=prediction_type)

    def signal_and_noise(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(alpha_bar), sqrt(1 - alpha_bar)) at timesteps (N,), each shaped (N, 1, ...) to multiply `like`."""
        alphas_cumprod = self.alphas_cumprod.to(like.device)[timesteps].view(-1, *[1] * (like.ndim - 1))
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def noisy_latents(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents (N, C, H, W) at timesteps (N,) of the forward process."""
        signal, sigma = self.signal_and_noise(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of model_pred: the noise, or the velocity (arXiv 2202.00512, section 4)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self.signal_and_noise(timesteps, latents)
        return signal * noise - sigma * latents

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """min-SNR weights (N,) of timesteps (N,) (arXiv 2303.09556, section 3.4).

        min(SNR, gamma) / SNR for noise, which is min(1, gamma / SNR) and so 1 where a schedule ends in pure noise
        (SNR 0); for velocity the denominator is SNR + 1, and the weight there is 0.
        """
        alphas_cumprod = self.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        if self.prediction_type == "epsilon":
            return (snr.new_tensor(gamma) / snr).clamp(max=1)  # of a float, torch would multiply by 1 / snr
        return snr.clamp(max=gamma) / (snr + 1)


def prior_preservation_loss(
    model_pred: Tensor, target: Tensor, *, prior_loss_weight: float, weight: Tensor | None = None
) -> Losses:
    """Mean squared error of the instance half plus `prior_loss_weight` times that of the class half.

    model_pred and target are (2B, C, H, W), instance half first; with `prior_loss_weight` 0 there is no class half and
    they are (B, C, H, W). `weight` (2B,) multiplies each image's error: every image keeps the weight of its own
    timestep. Computed in fp32, whatever the model ran in.

    Raises ValueError for different shapes, or an odd number of images in pairs.
    """
    if model_pred.shape != target.shape:
        raise ValueError(f"model_pred is {tuple(model_pred.shape)}, but target is {tuple(target.shape)}")
    error = (model_pred.float() - target.float()).square().flatten(1).mean(1)  # (2B,)
    if weight is not None:
        error = error * weight
    if prior_loss_weight == 0:
        instance = error.mean()
        return Losses(instance, instance, torch.zeros_like(instance))
    if len(error) % 2:
        raise ValueError(f"expected instance/class pairs, got {len(error)} images")
    instance, prior = (half.mean() for half in error.chunk(2))
    return Losses(instance + prior_loss_weight * prior, instance, prior)
