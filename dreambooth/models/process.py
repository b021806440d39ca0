"""Noise processes as pure functions of tensors: diffusions and rectified flow behind one protocol.

Noise is an argument everywhere, so tests can be exact. A moment is an integer timestep of a `Diffusion`, and sigma in
(0, 1] of a `RectifiedFlow`; each family scales it to its denoiser's argument.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import torch
from torch import Generator, Tensor
from torch.nn import functional

from dreambooth.errors import InputError

PredictionType = Literal["epsilon", "v_prediction", "sample"]
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")


class Process(Protocol):
    """How images become noise, and what a denoiser predicts."""

    def to(self, device: str) -> Self:
        """This process with its tensors on a device."""

    def draw(self, rng: Generator) -> Tensor:
        """A random moment for training, a scalar."""

    def noisy(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (N, C, H, W) of x0 at moments (N,)."""

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target (N, C, H, W) of model_pred."""

    def weight(self, timesteps: Tensor, *, min_snr_gamma: float | None) -> Tensor | None:
        """Loss weights (N,) of moments (N,), or None for 1 throughout."""

    def tuned_on(self, levels: int | None) -> Self:
        """This process with so many levels of a small picture's noise, if it knows any; None: as it is."""


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, with alphas_cumprod (T,) in fp32 (arXiv 2006.11239, eq. 4)."""

    alphas_cumprod: Tensor
    prediction_type: PredictionType = "epsilon"

    @classmethod
    def from_scheduler(cls, alphas_cumprod: Tensor, config: Mapping[str, object]) -> "Diffusion":
        """The process of a diffusers scheduler. Raises InputError for an unknown prediction type."""
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise InputError(
                f"the base model's scheduler has prediction_type {prediction_type!r}; "
                f"supported: {', '.join(PREDICTION_TYPES)}"
            )
        return cls(alphas_cumprod=alphas_cumprod.float(), prediction_type=prediction_type)

    def to(self, device: str) -> Self:
        """This process with its schedule on a device, so that a step copies none there."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def draw(self, rng: Generator) -> Tensor:
        """A timestep, uniform in 0 ... T - 1."""
        return torch.randint(len(self.alphas_cumprod), (), generator=rng)

    def signal_and_noise(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(abar), sqrt(1 - abar)) at timesteps (N,), each shaped (N, 1, ...) to multiply `like`."""
        alphas_cumprod = _column(self.alphas_cumprod.to(like.device)[timesteps], like)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def noisy(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t at timesteps (N,)."""
        signal, sigma = self.signal_and_noise(timesteps, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, the velocity (arXiv 2202.00512, section 4) or the sample."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        signal, sigma = self.signal_and_noise(timesteps, x0)
        return signal * noise - sigma * x0

    def weight(self, timesteps: Tensor, *, min_snr_gamma: float | None) -> Tensor | None:
        """min-SNR weights (N,) (arXiv 2303.09556, section 3.4), or None without a gamma.

        min(SNR, gamma) for the sample; that over SNR for noise, which is min(1, gamma / SNR) and so 1 where a schedule
        ends in pure noise (SNR 0); for velocity the denominator is SNR + 1, and the weight there is 0.
        """
        if min_snr_gamma is None:
            return None
        alphas_cumprod = self.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        if self.prediction_type == "epsilon":
            # Of a float, torch would multiply by 1 / snr.
            return (torch.full_like(snr, min_snr_gamma) / snr).clamp(max=1)
        clamped = snr.clamp(max=min_snr_gamma)
        return clamped if self.prediction_type == "sample" else clamped / (snr + 1)

    def tuned_on(self, levels: int | None) -> Self:
        """Itself: there is no small picture."""
        return self


@dataclass(frozen=True, kw_only=True)
class SuperResolution(Diffusion):
    """Diffusion of a picture whose denoiser sees a small copy of it, scaled up and noised by a diffusion of its own.

    The level of that noise is a further input, so that the denoiser learns how far to trust the copy (arXiv 2205.11487,
    section 2.3). Levels are 0 ... `levels` - 1.
    """

    small: Diffusion
    factor: int
    levels: int

    def draw_small(self, x0: Tensor, rng: Generator) -> tuple[Tensor, Tensor]:
        """The noised small copy of x0 (C, H, W), in its shape, and its level, a timestep of `small`, uniform."""
        level = torch.randint(self.levels, (), generator=rng)
        noise = torch.randn(x0.shape, generator=rng)
        side = x0.shape[-1] // self.factor
        copy = functional.interpolate(x0[None], (side, side), mode="area")
        # As a pipeline scales up the small picture.
        scaled_up = functional.interpolate(copy, x0.shape[-2:], mode="bilinear", align_corners=True)
        return self.small.noisy(scaled_up, noise[None], level[None])[0], level

    def tuned_on(self, levels: int | None) -> Self:
        """The same with other levels."""
        return self if levels is None else replace(self, levels=levels)


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """x_t = (1 - sigma) x0 + sigma noise, predicting the velocity noise - x0 (arXiv 2209.03003; 2403.03206, section 2).

    Sigma is drawn by the logit-normal density (arXiv 2403.03206, section 3.1). `shift` moves the draw to noisier
    sigmas, as the sampler's schedule does: sigma' = shift sigma / (1 + (shift - 1) sigma).
    """

    shift: float = 1.0

    def to(self, device: str) -> Self:
        """Itself: there is no schedule."""
        return self

    def draw(self, rng: Generator) -> Tensor:
        """A sigma in (0, 1), fp32."""
        sigma = torch.randn((), generator=rng).sigmoid()
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def noisy(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t at sigmas (N,)."""
        sigma = _column(timesteps, x0)
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity, away from the data, the same at every sigma."""
        return noise - x0

    def weight(self, timesteps: Tensor, *, min_snr_gamma: float | None) -> Tensor | None:
        """None: the draw is the weighting. Raises ValueError for a min-SNR gamma, which is defined for diffusion."""
        if min_snr_gamma is not None:
            raise ValueError(
                f"min_snr_gamma is {min_snr_gamma}, but min-SNR weighting has no meaning in rectified flow"
            )
        return None

    def tuned_on(self, levels: int | None) -> Self:
        """Itself: there is no small picture."""
        return self


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(N,) shaped to multiply (N, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))
