"""The VAE takes few images at once, and gives what it gives of all."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dreambooth.models import vae as in_parts


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """Eight pixels a latent, as Stable Diffusion's, but with few channels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        mid_block_add_attention=False,
    ).eval()


@pytest.mark.parametrize(
    ("height", "width", "at_once"), [(64, 64, [5]), (512, 512, [4, 1]), (512, 768, [2, 2, 1]), (1024, 1024, [1] * 5)]
)
@torch.no_grad()
def test_a_megapixel_at_once(
    vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, height: int, width: int, at_once: list[int]
) -> None:
    encoder, decoder = vae.encoder.forward, vae.decoder.forward
    seen: dict[str, list[int]] = {"encoder": [], "decoder": []}

    def encode(pixels: Tensor) -> Tensor:
        seen["encoder"].append(len(pixels))
        moments: Tensor = encoder(pixels)
        return moments

    def decode(latents: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        seen["decoder"].append(len(latents))
        decoded: Tensor = decoder(latents, latent_embeds)
        return decoded

    monkeypatch.setattr(vae.encoder, "forward", encode)
    monkeypatch.setattr(vae.decoder, "forward", decode)
    pixels = torch.rand(5, 3, height, width) * 2 - 1
    mean, std = in_parts.encode(vae, pixels)
    decoded = in_parts.decode(vae, mean)
    assert seen == {"encoder": at_once, "decoder": at_once}
    whole = vae.encode(pixels).latent_dist
    for found, expected in ((mean, whole.mean), (std, whole.std), (decoded, vae.decode(mean).sample)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
