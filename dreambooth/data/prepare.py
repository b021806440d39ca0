"""Encode photographs and class images as latents and text; the VAE is freed afterwards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.config.subject import fill_identifier
from dreambooth.data.batches import ImageSet, TrainingData
from dreambooth.data.buckets import region, size_for, sizes_of
from dreambooth.data.frozen_text import FrozenTextEncoders
from dreambooth.data.images import Cut, InstanceImage, Size, cuts, decode, read_image, to_pixels
from dreambooth.data.images.masks import cut_mask, find_mask
from dreambooth.data.latents import LatentCache, encode_latents
from dreambooth.data.repeats import repeats_of
from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.families import Family, Tensors, family_of
from dreambooth.models.families.no_text import HAS_TEXT
from dreambooth.models.process import Process

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
    family, base = family_of(directory), BaseSettings(directory)
    cut = [_cut(image, config, base, config.train.seed + index) for index, image in enumerate(images)]
    prompts = [*_prompts(config, images), config.prompts.class_prompt(config.subject)]
    if config.train.caption_dropout:
        prompts.append("")
    texts = _texts(text_encoders or FrozenTextEncoders(directory), prompts, config, device)
    encode = partial(_encode, family, family.load_vae(directory, device))
    instance, *other_sizes = [
        _images_of(size, cut, texts, repeats_of(images, config.images.repeats), config, base, encode)
        for size in sorted({one.size for one in cut})
    ]
    class_, side = None, config.images.resolution or base.resolution
    if class_images:
        class_latents = class_images if isinstance(class_images, LatentCache) else encode(class_images)
        count = len(class_latents)
        class_ = ImageSet(
            latents=class_latents,
            text={name: part[len(images) : len(images) + 1] for name, part in texts.items()},
            conditions=family.conditions([(side, side)] * count, [(0, 0)] * count, (side, side)),
        )
    return TrainingData(
        family=family,
        process=_process(config, base, (side, side)),
        instance=instance,
        other_sizes=tuple(other_sizes),
        micro_batch_size=config.train.micro_batch_size,
        class_=class_,
        seed=config.train.seed,
        noise_offset=config.train.noise_offset,
        caption_dropout=config.train.caption_dropout,
        no_text={name: part[-1] for name, part in texts.items()} if config.train.caption_dropout else {},
    )


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """The cuts of a photograph, and with masks weight their masks (V, H, W)."""

    cuts: list[Cut]
    masks: np.ndarray | None

    @property
    def size(self) -> Size:
        return self.cuts[0].size


def _cut(image: InstanceImage, config: DreamBoothConfig, base: BaseSettings, seed: int) -> _Cut:
    settings, resolution = config.images, config.images.resolution or base.resolution
    decoded = decode(read_image(image.address), image.address, max_pixels=settings.max_pixels)
    mask = find_mask(image, decoded, max_pixels=settings.max_pixels) if settings.masked else None
    box = region(decoded.image, mask, settings.masked, resolution)
    size = size_for(box, sizes_of(settings, base))
    made = cuts(
        decoded.image,
        size=size,
        crop=settings.crop,
        crops_per_image=settings.crops_per_image,
        flip=settings.flip,
        seed=seed,
        within=box,
    )
    if settings.masks != "weight":
        return _Cut(cuts=made, masks=None)
    # Photographs may be many and large, so their masks are cut here and not kept.
    picture, (_, *positions) = None if mask is None else mask.picture, base.x0_shape(*size)
    masks = [cut_mask(picture, one.box, (positions[0], positions[1]), mirrored=one.mirrored) for one in made]
    return _Cut(cuts=made, masks=np.stack(masks))


def _images_of(
    size: Size,
    cut: Sequence[_Cut],
    texts: Tensors,
    repeats: Sequence[int],
    config: DreamBoothConfig,
    base: BaseSettings,
    encode: Callable[[list[Image.Image]], LatentCache],
) -> ImageSet:
    """The photographs of one size, in their order."""
    places = [place for place, one in enumerate(cut) if one.size == size]
    pictures = [each for place in places for each in cut[place].cuts]
    masks = [mask for place in places if (mask := cut[place].masks) is not None]
    return ImageSet(
        latents=encode([each.picture for each in pictures]),
        text={name: part[places] for name, part in texts.items()},
        conditions=base.family.conditions(
            [each.original for each in pictures], [each.corner for each in pictures], size
        ),
        crops=len(cut[0].cuts),
        repeats=tuple(repeats[place] for place in places),
        masks=_weights(masks, config.images.mask_background) if masks else None,
        process=_process(config, base, size),
    )


def _process(config: DreamBoothConfig, base: BaseSettings, size: Size) -> Process:
    """The noise process of images of a size."""
    process = base.family.process(base.directory, base.x0_shape(*size))
    return process.tuned_on(config.super_resolution.noise_levels)


def _weights(masks: Sequence[np.ndarray], background: float) -> torch.Tensor:
    """Weights (N * V, 1, H, W) of the loss: 1 inside and `background` outside, over their mean in an image.

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
