"""Encode photographs and class images as latents and text; the VAE and a frozen text encoder are freed afterwards."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.config.subject import fill_identifier
from dreambooth.data.batches import ImageSet, TrainingData
from dreambooth.data.images import InstanceImage, open_image, squares, to_pixels
from dreambooth.data.latents import LatentCache, encode_latents
from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.families import Family, family_of
from dreambooth.models.vae import load_vae

_IMAGES_AT_ONCE = 8


def prepare_data(
    directory: Path,
    config: DreamBoothConfig,
    images: Sequence[InstanceImage],
    class_images: Sequence[Image.Image] | LatentCache,
    *,
    num_train_timesteps: int | None = None,
    device: str = "cpu",
) -> TrainingData:
    """Encode instance images and class images with the base model in `directory`.

    Raises ValueError if the subject has no identifier. `config.images.resolution` and `num_train_timesteps` None mean
    the base model's own. Class images may be the latents of an earlier call; without any there is no prior
    preservation.
    """
    resolution = config.images.resolution or BaseSettings(directory).resolution
    settings = config.images
    cut = [
        squares(
            open_image(image.address, max_pixels=settings.max_pixels),
            resolution=resolution,
            crop=settings.crop,
            crops_per_image=settings.crops_per_image,
            flip=settings.flip,
            seed=config.train.seed + index,
        )
        for index, image in enumerate(images)
    ]
    instance_prompt = config.prompts.instance_prompt(config.subject)
    identifier = str(config.subject.identifier)
    prompts = [
        instance_prompt if image.caption is None else fill_identifier(image.caption, identifier) for image in images
    ]
    texts = _texts(directory, [*prompts, config.prompts.class_prompt(config.subject)], config, device)
    vae = load_vae(directory, device)
    instance = _encode(vae, [square for squares_of_one in cut for square in squares_of_one])
    class_ = None
    if class_images:
        latents = class_images if isinstance(class_images, LatentCache) else _encode(vae, class_images)
        class_ = ImageSet(latents=latents, text=texts[-1:])
    return TrainingData(
        instance=ImageSet(latents=instance, text=texts[:-1], crops=len(cut[0])),
        class_=class_,
        seed=config.train.seed,
        num_train_timesteps=num_train_timesteps or BaseSettings(directory).num_train_timesteps,
        noise_offset=config.train.noise_offset,
    )


def _encode(vae: AutoencoderKL, images: Sequence[Image.Image]) -> LatentCache:
    """Encode pictures a few at a time: a thousand as floating-point pixels would fill gigabytes."""
    parts = [
        encode_latents(vae, to_pixels(images[start : start + _IMAGES_AT_ONCE]))
        for start in range(0, len(images), _IMAGES_AT_ONCE)
    ]
    return LatentCache(mean=torch.cat([part.mean for part in parts]), std=torch.cat([part.std for part in parts]))


def _texts(directory: Path, prompts: list[str], config: DreamBoothConfig, device: str) -> Tensor:
    """input_ids (N, L), or with a frozen text encoder encoder_hidden_states (N, L, D), computed once."""
    family: Family = family_of(directory)
    input_ids = family.tokenize(directory, prompts)
    if config.train.runs_text_encoder:
        return input_ids
    text_encoder = family.load_text_encoder(directory).to(device).eval()
    with torch.no_grad():
        return family.encode_text(text_encoder, input_ids.to(device)).cpu()
