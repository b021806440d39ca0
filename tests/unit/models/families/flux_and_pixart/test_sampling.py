"""FLUX.1 and PixArt-Sigma are sampled as the plain diffusers pipelines sample."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from flux_and_pixart_runs import PROMPTS, SIDE, plain_arguments, plain_pipeline
from torch import Tensor

from dreambooth.models.families import family_of
from dreambooth.models.process import RectifiedFlow
from dreambooth.sampling.sampler import load_pipeline, sample


def knowing(pipeline: Any, process: Any, x0: Tensor) -> None:
    """Put a denoiser in place that answers with the training target of x0, whatever it is asked."""
    config, packed = pipeline.transformer.config, "Flux" in type(pipeline).__name__

    def forward(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        x_t = pipeline._unpack_latents(hidden_states, SIDE, SIDE, 8) if packed else hidden_states
        if isinstance(process, RectifiedFlow):
            sigma = timestep.reshape(-1, 1, 1, 1)
            noise = (x_t - (1 - sigma) * x0) / sigma
        else:
            signal, sigma = process.signal_and_noise(timestep, x_t)
            noise = (x_t - signal * x0) / sigma
        target = process.target(x0, noise, timestep)
        if packed:
            return (pipeline._pack_latents(target, *target.shape),)
        variance = torch.full_like(target, 7.0) if config.out_channels > config.in_channels else target[:, :0]
        return (torch.cat([target, variance], dim=1),)

    pipeline.transformer.forward = forward


def test_a_denoiser_that_knows_x0_gives_it_back_and_its_picture(base: Path) -> None:
    family, pipeline = family_of(base), load_pipeline(base)
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        x0, _ = family.encode_images(pipeline.vae, pixels)
        expected = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
    knowing(pipeline, family.process(base, (x0.shape[1], x0.shape[2], x0.shape[3])), x0)
    pictures = sample(pipeline, PROMPTS, [0, 1], num_inference_steps=10, guidance_scale=1, height=SIDE, width=SIDE)
    for picture, wanted in zip(pictures, pipeline.image_processor.postprocess(expected), strict=True):
        difference = np.abs(np.asarray(picture, dtype=int) - np.asarray(wanted, dtype=int))
        assert difference.max() <= 1


def test_embeddings_and_pictures_equal_the_pipelines(base: Path) -> None:
    ours, plain = load_pipeline(base), plain_pipeline(base)
    plain.scheduler = type(ours.scheduler).from_config(ours.scheduler.config)
    family, tokens = family_of(base), family_of(base).tokenize(base, PROMPTS)
    with torch.no_grad():
        encoders = {part.folder: family.load(base, part.folder).eval() for part in family.text_encoders(base)}
        text = family.encode_text(encoders, tokens)
        states, other = plain.encode_prompt(PROMPTS)[:2]
    assert torch.equal(text["states"], states)
    assert torch.equal(text["pooled" if "pooled" in text else "mask"], other)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": SIDE, "width": SIDE}
    pictures = sample(ours, PROMPTS, [5, 6], dtype=torch.float32, **settings)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = plain(PROMPTS, generator=generators, **settings, **plain_arguments(plain)).images
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in expected]
