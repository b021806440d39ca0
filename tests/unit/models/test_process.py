"""Noise processes: what is drawn, noised, predicted and weighted, against diffusers and by formula."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Generator, Tensor

from dreambooth.models.process import Diffusion, Process, RectifiedFlow, SuperResolution

SHAPE = (3, 2, 8, 8)
DRAWS = 3000
FAR = 1.63 / math.sqrt(DRAWS)
"""The largest distance of two distribution functions that one sample in a hundred exceeds (Kolmogorov's)."""


def drawn(process: Process, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.stack([process.draw(rng) for _ in range(DRAWS)])


def noise_and_x0(shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)


def diffusion(timesteps: int = 1000) -> Diffusion:
    scheduler = DDPMScheduler(num_train_timesteps=timesteps, beta_schedule="squaredcos_cap_v2")
    return Diffusion.from_scheduler(scheduler.alphas_cumprod, scheduler.config)


def super_resolution(small: Diffusion, levels: int = 1000) -> SuperResolution:
    return SuperResolution(alphas_cumprod=diffusion().alphas_cumprod, small=small, factor=4, levels=levels)


class TestRectifiedFlow:
    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_noisy_images_are_those_of_the_samplers_schedule(self, shift: float) -> None:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(7)
        (noise, x0), stops = noise_and_x0(), torch.tensor([0, 3, 6])
        found = RectifiedFlow(shift=shift).noisy(x0, noise, scheduler.sigmas[stops])
        assert torch.equal(found, scheduler.scale_noise(x0, scheduler.timesteps[stops], noise))

    def test_a_step_along_the_target_ends_at_the_data(self) -> None:
        (noise, x0), process, sigma = noise_and_x0(), RectifiedFlow(shift=3.0), torch.tensor([0.1, 0.5, 1.0])
        noisy, target = process.noisy(x0, noise, sigma), process.target(x0, noise, sigma)
        torch.testing.assert_close(noisy - sigma.view(-1, 1, 1, 1) * target, x0)
        torch.testing.assert_close(process.noisy(x0, noise, torch.ones(3)), noise)

    @pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
    def test_the_draw_is_logit_normal_and_then_shifted(self, shift: float) -> None:
        sigma = drawn(RectifiedFlow(shift=shift)).sort().values
        assert sigma.dtype == torch.float32
        assert 0 < sigma[0] < sigma[-1] < 1
        before = sigma / (shift - (shift - 1) * sigma)  # the shift undone
        expected = torch.special.ndtr(before.logit())
        assert float((expected - (torch.arange(DRAWS) + 0.5) / DRAWS).abs().max()) < FAR
        assert float(sigma.median()) == pytest.approx(shift / (shift + 1), abs=0.02)

    def test_a_seed_is_a_draw(self) -> None:
        process = RectifiedFlow(shift=3.0)
        assert torch.equal(drawn(process), drawn(process))
        assert not torch.equal(drawn(process), drawn(process, seed=1))

    def test_the_draw_is_the_weighting(self) -> None:
        assert RectifiedFlow().weight(torch.tensor([0.1, 0.9]), min_snr_gamma=None) is None
        with pytest.raises(ValueError, match=r"min_snr_gamma is 5\.0, but min-SNR weighting has no meaning in rectif"):
            RectifiedFlow().weight(torch.tensor([0.1, 0.9]), min_snr_gamma=5.0)


class TestDiffusion:
    def test_every_timestep_is_drawn_alike(self) -> None:
        timesteps = drawn(diffusion(timesteps=4))
        assert timesteps.dtype == torch.int64
        shares = torch.bincount(timesteps) / DRAWS
        torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.03, rtol=0)

    def test_its_schedule_goes_to_a_device(self) -> None:
        process = diffusion()
        assert process.to("meta").alphas_cumprod.device.type == "meta"
        assert process.alphas_cumprod.device.type == "cpu"


class TestSuperResolution:
    def test_the_small_picture_is_noised_by_its_level(self) -> None:
        small = Diffusion(alphas_cumprod=torch.tensor([1.0, 0.0]))
        x0, seen = torch.full((3, 16, 16), 0.5), set()
        for seed in range(20):
            rng = torch.Generator().manual_seed(seed)
            picture, level = super_resolution(small, levels=2).draw_small(x0, rng)
            assert picture.shape == x0.shape
            seen.add(int(level))
            if level == 0:  # no noise at all
                torch.testing.assert_close(picture, x0)
            else:  # nothing else
                assert float(picture.std()) == pytest.approx(1, abs=0.1)
        assert seen == {0, 1}

    def test_details_smaller_than_a_position_of_the_small_picture_are_lost(self) -> None:
        small = Diffusion(alphas_cumprod=torch.ones(1))
        rows = torch.tensor([1.0, -1.0]).repeat(8)
        picture, _ = super_resolution(small, levels=1).draw_small(rows.expand(3, 16, 16).clone(), Generator())
        torch.testing.assert_close(picture, torch.zeros(3, 16, 16))

    def test_levels_are_those_that_it_is_tuned_on(self) -> None:
        process, x0 = super_resolution(diffusion()), torch.zeros(3, 16, 16)
        fewer, rng = process.tuned_on(3), torch.Generator().manual_seed(0)
        assert {int(fewer.draw_small(x0, rng)[1]) for _ in range(40)} == {0, 1, 2}
        assert process.tuned_on(None) is process
        assert process.levels == 1000


@pytest.mark.parametrize("process", [RectifiedFlow(shift=3.0), diffusion()], ids=["flow", "diffusion"])
def test_without_a_small_picture_levels_change_nothing(process: Process) -> None:
    assert process.tuned_on(3) is process
