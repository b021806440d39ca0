"""Noise and losses of DeepFloyd IF are those of diffusers' pipelines."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepfloyd_runs import SIDES, configured, further, prepared
from PIL import Image
from replicas.plain import plain_pipeline
from torch import Tensor

from dreambooth.models.families import family_of
from dreambooth.models.process import SuperResolution
from dreambooth.sampling.sampler import load_pipeline
from dreambooth.training.model import load_model


@contextmanager
def knowing(pipeline: Any, process: Any, x0: Tensor) -> Iterator[None]:
    """A pipeline whose denoiser answers with the training target of x0 and a variance of zeros."""
    unet, forward = pipeline.unet, pipeline.unet.forward

    def answer(sample: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        noisy, moments = sample[:, :3], timestep.expand(len(sample))
        signal, sigma = process.signal_and_noise(moments, noisy)
        target = process.target(x0, (noisy - signal * x0) / sigma, moments)
        return (torch.cat([target, torch.zeros_like(target)], dim=1),)

    unet.forward = answer
    try:
        yield
    finally:
        unet.forward = forward


class TestNoise:
    @pytest.mark.parametrize("sampler", ["ours", "the base's"])
    def test_a_denoiser_that_knows_the_picture_gives_it_back(self, base: Path, stage: str, sampler: str) -> None:
        side, family = SIDES[stage], family_of(base)
        process = family.process(base, (3, side, side))
        pipeline = load_pipeline(base) if sampler == "ours" else plain_pipeline(base)
        x0 = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1
        with knowing(pipeline, process, x0):
            found = pipeline(
                "a dog", num_inference_steps=10, guidance_scale=1.0, output_type="pt", **further(stage, 1)
            ).images
        torch.testing.assert_close(found, x0, rtol=0, atol=1e-5)
        assert pipeline.scheduler.config.thresholding

    def test_a_strongly_guided_picture_keeps_within_the_thresholds(self, base: Path, stage: str) -> None:
        pipeline = load_pipeline(base)
        with torch.no_grad():
            pipeline.unet.conv_out.weight.mul_(50)  # as far off as a guidance that is much too strong
        found = pipeline(
            "a dog", num_inference_steps=5, guidance_scale=9.0, output_type="pt", **further(stage, 1)
        ).images
        assert torch.isfinite(found).all()
        assert found.abs().max() <= 1

    def test_losses_are_those_of_the_pipelines_own_parts(self, base: Path, photos: Path) -> None:
        config = configured(base, photos)
        model, data = load_model(base, config).eval(), prepared(base, config, photos)
        batch, pipeline = data.batch(range(2)), plain_pipeline(base)
        noisy = pipeline.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        more: dict[str, Tensor] = {}
        if isinstance(data.process, SuperResolution):
            noisy = torch.cat([noisy, batch.conditions["small"]], dim=1)
            more = {"class_labels": batch.conditions["noise_level"]}
        states, _ = pipeline.encode_prompt(
            ["a photo of sks Dog"] * 2 + ["a photo of a Dog"] * 2, do_classifier_free_guidance=False
        )
        with torch.no_grad():
            predicted = pipeline.unet(noisy, batch.timesteps, encoder_hidden_states=states, **more).sample[:, :3]
            losses = model(*batch)
        errors = (predicted - batch.noise).square().mean((1, 2, 3))
        torch.testing.assert_close(losses.instance, errors[:2].mean())
        torch.testing.assert_close(losses.prior, errors[2:].mean())
        assert len(batch.timesteps.unique()) == 4

    def test_starts_from_pixels(self, base: Path, stage: str, photos: Path) -> None:
        data = prepared(base, configured(base, photos), photos)
        assert data.class_ is not None
        first = np.asarray(Image.open(photos / "0.png").resize((SIDES[stage],) * 2))
        expected = torch.from_numpy(first.copy()).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(data.class_.latents.sample(0, torch.randn(expected.shape)), expected)
