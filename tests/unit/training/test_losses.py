"""The prior-preservation loss: against numbers worked out by hand, and against diffusers."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from dreambooth.errors import InputError
from dreambooth.models.process import Diffusion
from dreambooth.training.losses import Losses, image_errors, prior_preservation_loss
from dreambooth.training.model import DreamBoothModel

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def scheduler(prediction_type: str = "epsilon", **changes: Any) -> DDPMScheduler:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **changes}
    return DDPMScheduler(prediction_type=prediction_type, **settings)


def schedule(prediction_type: str = "epsilon", **changes: Any) -> Diffusion:
    theirs = scheduler(prediction_type, **changes)
    return Diffusion.from_scheduler(theirs.alphas_cumprod, theirs.config)


def images(*values: list[float]) -> Tensor:
    """One image of (1, 1, n) for each row of values."""
    return torch.tensor(values)[:, None, None, :]


def loss(model_pred: Tensor, target: Tensor, *, prior_loss_weight: float, **weights: Tensor | None) -> Losses:
    """Losses of images of one size."""
    return prior_preservation_loss(image_errors(model_pred, target, **weights), prior_loss_weight=prior_loss_weight)


class TestByHand:
    pred = images([1.0, 3.0], [0.0, 2.0], [4.0, 0.0], [2.0, 2.0])
    target = images([0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0])
    # Errors per image: 5, 2 | 4.5, 4

    def test_two_halves(self) -> None:
        losses = loss(self.pred, self.target, prior_loss_weight=0.5)
        assert [float(loss) for loss in losses] == [3.5 + 0.5 * 4.25, 3.5, 4.25]

    def test_every_image_has_its_own_weight(self) -> None:
        weight = torch.tensor([1.0, 0.5, 2.0, 0.25])
        losses = loss(self.pred, self.target, prior_loss_weight=2.0, weight=weight)
        assert [float(loss) for loss in losses] == [3.0 + 2 * 5.0, 3.0, 5.0]

    def test_without_prior_preservation_all_images_are_instance_images(self) -> None:
        losses = loss(self.pred[:3], self.target[:3], prior_loss_weight=0)
        assert [float(loss) for loss in losses] == [pytest.approx(11.5 / 3), pytest.approx(11.5 / 3), 0]

    def test_a_mask_weighs_positions_of_the_instance_half(self) -> None:
        mask = torch.tensor([[2.0, 0.0], [0.5, 1.5]])[:, None, None, :]  # errors per image: 1, 3 | 4.5, 4 as before
        weight = torch.tensor([1.0, 0.5, 2.0, 0.25])
        losses = loss(self.pred, self.target, prior_loss_weight=2.0, mask=mask)
        assert [float(loss) for loss in losses] == [2.0 + 2 * 4.25, 2.0, 4.25]
        losses = loss(self.pred, self.target, prior_loss_weight=2.0, weight=weight, mask=mask)
        assert [float(loss) for loss in losses] == [1.25 + 2 * 5.0, 1.25, 5.0]
        alone = loss(self.pred[:2], self.target[:2], prior_loss_weight=0, mask=mask)
        assert [float(loss) for loss in alone] == [2.0, 2.0, 0]

    def test_the_gradient_reaches_both_halves(self) -> None:
        pred = self.pred.clone().requires_grad_()
        loss(pred, self.target, prior_loss_weight=0.5).total.backward()
        # d/dx of a mean over 2 images of 2 values: 2 (x - target) / 4, and half of that in the class half.
        assert torch.equal(
            pred.grad, (self.pred - self.target) / 2 * torch.tensor([1, 1, 0.5, 0.5])[:, None, None, None]
        )

    def test_in_fp32_whatever_the_model_ran_in(self) -> None:
        pred, target = torch.full((2, 1, 64, 64), 1.0078125), torch.ones(2, 1, 64, 64)
        losses = loss(pred.bfloat16(), target, prior_loss_weight=1)
        assert losses.total.dtype is torch.float32
        assert float(losses.instance) == 0.0078125**2

    def test_pairs_are_needed(self) -> None:
        with pytest.raises(ValueError, match="expected instance/class pairs, got 3 images"):
            loss(self.pred[:3], self.target[:3], prior_loss_weight=1)

    def test_shapes_that_differ(self) -> None:
        with pytest.raises(ValueError, match=r"model_pred is \(4, 1, 1, 2\), but target is \(3, 1, 1, 2\)"):
            loss(self.pred, self.target[:3], prior_loss_weight=1)


class TestAgainstDiffusers:
    timesteps = torch.tensor([0, 1, 10, 250, 500, 998, 999])

    @pytest.mark.parametrize("prediction_type", PREDICTIONS)
    def test_noisy_latents_and_target(self, prediction_type: str) -> None:
        latents, noise = torch.randn(2, 7, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        ours, theirs = schedule(prediction_type), scheduler(prediction_type)
        noisy = theirs.add_noise(latents, noise, self.timesteps)
        torch.testing.assert_close(ours.noisy(latents, noise, self.timesteps), noisy, rtol=1e-6, atol=1e-6)
        velocity = theirs.get_velocity(latents, noise, self.timesteps)
        target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[prediction_type]
        torch.testing.assert_close(ours.target(latents, noise, self.timesteps), target, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("gamma", [1.0, 5.0])
    @pytest.mark.parametrize("prediction_type", PREDICTIONS)
    def test_min_snr_weights(self, prediction_type: str, gamma: float) -> None:
        timesteps = torch.arange(1000)
        snr = compute_snr(scheduler(prediction_type), timesteps)
        expected = snr.clamp(max=gamma) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
        weight = schedule(prediction_type).weight(timesteps, min_snr_gamma=gamma)
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("gamma", [0.5, 5.0, 20.0])
    @pytest.mark.parametrize(("prediction_type", "at_the_end"), [("epsilon", 1.0), ("v_prediction", 0.0)])
    def test_min_snr_where_the_schedule_ends_in_pure_noise(
        self, prediction_type: str, at_the_end: float, gamma: float
    ) -> None:
        """Against the paper's weights (its section 3.4) in double precision, whose limit for SNR 0 is known."""
        ours = schedule(prediction_type, rescale_betas_zero_snr=True, timestep_spacing="trailing")
        assert float(ours.alphas_cumprod[-1]) == 0
        alphas = ours.alphas_cumprod.double()[:-1]
        snr = alphas / (1 - alphas)
        expected = [min(s, gamma) / (s if prediction_type == "epsilon" else s + 1) for s in snr.tolist()]
        weight = ours.weight(torch.arange(1000), min_snr_gamma=gamma)
        torch.testing.assert_close(
            weight.double(), torch.tensor([*expected, at_the_end]).double(), rtol=1e-4, atol=1e-9
        )
        # On to the limit from where there is still a signal.
        assert abs(float(weight[-2]) - at_the_end) < 1e-3

    @pytest.mark.parametrize("prediction_type", PREDICTIONS)
    def test_the_loss_at_every_timestep_of_such_a_schedule_is_a_number(self, prediction_type: str) -> None:
        ours = schedule(prediction_type, rescale_betas_zero_snr=True)
        rng = torch.Generator().manual_seed(0)
        timesteps = torch.arange(1000)
        latents, noise = torch.randn(2, 1000, 1, 2, 2, generator=rng)
        pred = ours.noisy(latents, noise, timesteps).requires_grad_()
        loss(
            pred,
            ours.target(latents, noise, timesteps),
            prior_loss_weight=1,
            weight=ours.weight(timesteps, min_snr_gamma=5.0),
        ).total.backward()
        assert pred.grad is not None
        assert pred.grad.isfinite().all()

    def test_a_model_that_predicts_something_else(self) -> None:
        with pytest.raises(InputError, match=r"prediction_type 'score'; supported: epsilon, v_prediction, sample"):
            Diffusion.from_scheduler(scheduler().alphas_cumprod, {"prediction_type": "score"})


class Echo:
    """A family whose denoiser answers its own parameter times the noisy latents."""

    def encode_text(self, text_encoders: dict[str, nn.Module], text: dict[str, Tensor]) -> dict[str, Tensor]:
        assert not text_encoders
        return text

    def denoise(self, denoiser: nn.Module, noisy: Tensor, *others: object) -> Tensor:
        result: Tensor = denoiser(noisy)
        return result


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_model_gives_each_image_the_weight_of_its_own_timestep(prediction_type: str) -> None:
    """Instance and class half have other timesteps: weights made from one half, or from a mix-up, show."""
    rng = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=rng)
    timesteps = torch.tensor([900, 20, 3, 600])
    theirs, ours = scheduler(prediction_type), schedule(prediction_type)
    model = DreamBoothModel(
        family=Echo(),  # type: ignore[arg-type]
        denoiser=nn.Identity(),
        text_encoders={},
        process=ours,
        prior_loss_weight=0.7,
        min_snr_gamma=5.0,
    )
    losses = model(latents, noise, timesteps, {}, {})

    noisy = theirs.add_noise(latents, noise, timesteps)
    velocity = theirs.get_velocity(latents, noise, timesteps)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[prediction_type]
    snr = compute_snr(theirs, timesteps)
    weight = snr.clamp(max=5.0) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
    errors = [float(weight[i]) * float((noisy[i] - target[i]).square().mean()) for i in range(4)]
    assert float(losses.instance) == pytest.approx((errors[0] + errors[1]) / 2, rel=1e-4)
    assert float(losses.prior) == pytest.approx((errors[2] + errors[3]) / 2, rel=1e-4)
    assert float(losses.total) == pytest.approx(float(losses.instance) + 0.7 * float(losses.prior), rel=1e-6)
