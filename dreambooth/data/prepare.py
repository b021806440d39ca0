"""Encode photographs and class images as latents and text; the VAE is freed afterwards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dreambooth.config.settings import DreamBoothConfig, ImagesConfig
from dreambooth.config.subject import fill_identifier
from dreambooth.data.batches import ImageSet, TrainingData
from dreambooth.data.frozen_text import FrozenTextEncoders
from dreambooth.data.images import InstanceImage, Square, decode, read_image, squares, to_pixels
from dreambooth.data.images.masks import cut_mask, find_mask
from dreambooth.data.latents import LatentCache, encode_latents
from dreambooth.data.repeats import repeats_of
from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.families import Family, Tensors, family_of
from dreambooth.models.families.no_text import HAS_TEXT
from dreambooth.models.process import tuned_on

_IMAGES_AT_ONCE = 8
_LEAST_WEIGHT = 1e-3
"""Least mean to divide by, where crops show nothing of the subject and the background counts nothing."""


def prepare_data(
    directory: Path,
    config: DreamBoothConfig,
    images: Sequence[InstanceImage],
    class_images: Sequence[Image.Image] | LatentCache,
    *,
    text_encoders: FrozenTextEncoders | None = None,
    device: str = "cpu",
) -> TrainingData:
    """Encode instance images and class images with the base model in `directory`.

    The subject's identifier must be set; ValueError if it isn't. `config.images.resolution` None is what the base model
    was trained with. Class images may be the latents of an earlier call; without any there is no prior preservation.
    `text_encoders` of earlier calls needn't be loaded again; None: they are freed afterwards.
    """
    family, settings, base = family_of(directory), config.images, BaseSettings(directory)
    resolution = settings.resolution or base.resolution
    side = base.x0_shape(resolution)[-1]
    cut = [_cut(image, settings, resolution, side, config.train.seed + index) for index, image in enumerate(images)]
    all_squares = [square for squares_of_one, _ in cut for square in squares_of_one]
    masks = [mask for _, mask in cut if mask is not None]
    prompts = [*_prompts(config, images), config.prompts.class_prompt(config.subject)]
    if config.train.caption_dropout:
        prompts.append("")
    texts = _texts(text_encoders or FrozenTextEncoders(directory), prompts, config, device)
    vae = family.load_vae(directory, device)
    instance = ImageSet(
        latents=_encode(family, vae, [square.picture for square in all_squares]),
        text={name: part[: len(images)] for name, part in texts.items()},
        conditions=family.conditions(
            [square.original for square in all_squares], [square.corner for square in all_squares], resolution
        ),
        crops=len(cut[0][0]),
        repeats=repeats_of(images, settings.repeats),
        masks=_weights(masks, settings.mask_background) if masks else None,
    )
    class_ = None
    if class_images:
        class_latents = class_images if isinstance(class_images, LatentCache) else _encode(family, vae, class_images)
        count = len(class_latents)
        class_ = ImageSet(
            latents=class_latents,
            text={name: part[len(images) : len(images) + 1] for name, part in texts.items()},
            conditions=family.conditions([(resolution, resolution)] * count, [(0, 0)] * count, resolution),
        )
    shape = instance.latents.mean.shape
    return TrainingData(
        family=family,
        process=tuned_on(
            family.process(directory, (shape[1], shape[2], shape[3])), config.super_resolution.noise_levels
        ),
        instance=instance,
        class_=class_,
        seed=config.train.seed,
        noise_offset=config.train.noise_offset,
        caption_dropout=config.train.caption_dropout,
        no_text={name: part[-1] for name, part in texts.items()} if config.train.caption_dropout else {},
    )


def _cut(
    image: InstanceImage, settings: ImagesConfig, resolution: int, side: int, seed: int
) -> tuple[list[Square], np.ndarray | None]:
    """The squares of a photograph, and with masks weight their masks (V, side, side)."""
    decoded = decode(read_image(image.address), image.address, max_pixels=settings.max_pixels)
    mask = find_mask(image, decoded, max_pixels=settings.max_pixels) if settings.masked else None
    cut = squares(
        decoded.image,
        resolution=resolution,
        crop=settings.crop,
        crops_per_image=settings.crops_per_image,
        flip=settings.flip,
        seed=seed,
        within=mask.box(resolution) if mask is not None and settings.masks == "crop" else None,
    )
    if settings.masks != "weight":
        return cut, None
    # Photographs may be many and large, so their masks are cut here and not kept.
    picture = None if mask is None else mask.picture
    return cut, np.stack([cut_mask(picture, square.box, side, mirrored=square.mirrored) for square in cut])


def _weights(masks: Sequence[np.ndarray], background: float) -> torch.Tensor:
    """Weights (N * V, 1, side, side) of the loss: 1 inside and `background` outside, over their mean in an image.

    So the loss of an image is on average what it was, and a learning rate means the same. The mean is over all its
    crops: a crop that shows nothing of the subject counts little.
    """
    weights = [background + (1 - background) * inside for inside in masks]
    averaged = [weight / max(float(weight.mean()), _LEAST_WEIGHT) for weight in weights]
    return torch.from_numpy(np.concatenate(averaged))[:, None].float()


def _prompts(config: DreamBoothConfig, images: Sequence[InstanceImage]) -> list[str]:
    instance_prompt = config.prompts.instance_prompt(config.subject)
    identifier = str(config.subject.identifier)
    return [
        instance_prompt if image.caption is None else fill_identifier(image.caption, identifier) for image in images
    ]


def _encode(family: Family, vae: Any, images: Sequence[Image.Image]) -> LatentCache:
    """Encode pictures a few at a time: a thousand as floating-point pixels would fill gigabytes."""
    starts = range(0, len(images), _IMAGES_AT_ONCE)
    parts = [encode_latents(family, vae, to_pixels(images[start : start + _IMAGES_AT_ONCE])) for start in starts]
    return LatentCache.joined(parts)


def _texts(frozen: FrozenTextEncoders, prompts: Sequence[str], config: DreamBoothConfig, device: str) -> Tensors:
    """Token ids (N, L) for text encoders that every step runs, and what frozen ones give, computed once."""
    family = family_of(frozen.directory)
    tokens, run = family.tokenize(frozen.directory, prompts), family.run_text_encoders(frozen.directory, config.train)
    texts = {name: part for name, part in tokens.items() if name.partition(".")[0] in run}
    for part in family.text_encoders(frozen.directory):
        if part.folder not in run:
            texts |= frozen.encode(part.folder, tokens, device=device)
    if "" in prompts and family.no_text_is_zero(frozen.directory):
        texts[HAS_TEXT] = torch.tensor([float(prompt != "") for prompt in prompts])
    return texts
