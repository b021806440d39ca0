"""The latent cache: the VAE's posterior in the denoiser's scale, encoded once, sampled as often as wanted."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dreambooth.data.latents import LatentCache, encode_latents
from dreambooth.models.families.stable_diffusion import StableDiffusion

FAMILY = StableDiffusion()


@pytest.fixture(scope="module")
def vae(tiny_pipeline: Path) -> AutoencoderKL:
    return FAMILY.load_vae(tiny_pipeline, "cpu")


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_mean_and_std_are_scaled(vae: AutoencoderKL, pixels: Tensor) -> None:
    cache = encode_latents(FAMILY, vae, pixels)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(cache.mean, posterior.mean * 0.18215)
    torch.testing.assert_close(cache.std, posterior.std * 0.18215)
    assert cache.mean.shape == (3, 4, 16, 16)
    assert len(cache) == 3


def test_a_sample_is_what_diffusers_makes_of_the_same_noise(vae: AutoencoderKL, pixels: Tensor) -> None:
    with torch.no_grad():
        latents = vae.encode(pixels[1:2]).latent_dist.sample(torch.Generator().manual_seed(4))[0]
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4))[0]
    torch.testing.assert_close(
        encode_latents(FAMILY, vae, pixels).sample(1, noise), latents * vae.config.scaling_factor
    )


def test_a_vae_with_a_shift(vae: AutoencoderKL, pixels: Tensor) -> None:
    shifted = AutoencoderKL.from_config({**vae.config, "scaling_factor": 0.5, "shift_factor": 0.25}).eval()
    shifted.load_state_dict(vae.state_dict())
    cache = encode_latents(FAMILY, shifted, pixels)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    # What a pipeline decodes is latents / scale + shift; the std isn't shifted.
    torch.testing.assert_close(cache.mean / 0.5 + 0.25, posterior.mean)
    torch.testing.assert_close(cache.std / 0.5, posterior.std)


def test_how_many_are_encoded_at_once_does_not_matter(vae: AutoencoderKL, pixels: Tensor) -> None:
    together, one_by_one = (
        encode_latents(FAMILY, vae, pixels, batch_size=8),
        encode_latents(FAMILY, vae, pixels, batch_size=1),
    )
    torch.testing.assert_close(together.mean, one_by_one.mean)
    torch.testing.assert_close(together.std, one_by_one.std)
    assert len(encode_latents(FAMILY, vae, pixels, batch_size=2)) == 3


def test_sampled_with_the_noise_given() -> None:
    cache = LatentCache(mean=torch.full((2, 1, 1, 2), 3.0), std=torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
    noise = torch.tensor([[[1.0, -0.5]]])
    assert cache.sample(0, noise).tolist() == [[[4.0, 2.5]]]
    assert cache.sample(1, noise).tolist() == [[[5.0, 2.0]]]
    assert cache.mean.eq(3).all()


def test_nothing_of_it_holds_the_vae_or_a_graph(vae: AutoencoderKL, pixels: Tensor) -> None:
    cache = encode_latents(FAMILY, vae, pixels)
    assert not cache.mean.requires_grad
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert cache.mean.dtype is cache.std.dtype is torch.float32
