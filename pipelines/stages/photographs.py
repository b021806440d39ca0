"""Samples of the fine-tuned and the base model, their similarity to the subject, and a verdict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.data.images import Cut, InstanceImage, cuts, decode, open_image, png_bytes, read_image
from dreambooth.data.images.masks import Box, cut_mask, find_mask
from dreambooth.errors import InputError
from dreambooth.evaluation.prompts import EvaluationPrompt
from dreambooth.evaluation.verdict import ShortVerdict, Similarity
from dreambooth.miniature import BASES
from pipelines.tasks import Call, MaskedPicture, SampleRequest, Samplers, Source

_IMAGES_PER_REQUEST = 4
DEFAULT_ENCODER = "facebook/dino-vits16"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """PNG pictures by prompt, before and after, seed by seed, and what was measured (None without an image encoder).

    Earlier versions stored no verdict.
    """

    instance: tuple[bytes, ...]
    before: dict[str, list[bytes]]
    after: dict[str, list[bytes]]
    class_prompt: str
    similarity: Similarity | None
    verdict: ShortVerdict | None = None


def meant_encoder(config: DreamBoothConfig) -> str:
    """The address of a configuration's image encoder, available or not."""
    return config.evaluation.image_encoder or ("miniature" if config.base_model in BASES else DEFAULT_ENCODER)


def image_encoder(config: DreamBoothConfig) -> str:
    """The address of a configuration's image encoder. Raises InputError if unavailable."""
    from dreambooth.evaluation.encoders import find_image_encoder  # imports torch

    chosen = meant_encoder(config)
    try:
        find_image_encoder(chosen)
    except InputError as error:
        raise InputError(f"evaluation.image_encoder: {error}") from None
    return chosen


def evaluate(
    config: DreamBoothConfig,
    instance: Sequence[bytes],
    samplers: Samplers,
    *,
    base: Source,
    fine_tuned: Source,
    encoder: str | None,
    dtype: str,
    on_progress: Callable[[int, int], None] = lambda made, total: None,
) -> Evaluation:
    """Sample before and after, prompt by prompt, computing in `dtype`; `on_progress(made, total)` counts images.

    `instance` are the instance images by `instance_pictures`.
    """
    class_prompt = config.prompts.class_prompt(config.subject)
    prompts = config.evaluation.prompts_of(config.subject, config.prompts)
    requests = sample_requests(config, base, fine_tuned, dtype)
    pictures = _sample(samplers, requests, on_progress)
    before, after = _by_prompt(requests, pictures, base), _by_prompt(requests, pictures, fine_tuned)
    similarity, verdict = None, None
    if encoder is not None:
        from dreambooth.evaluation.short import judge, similarity_of  # imports torch

        sets = {
            "instance": list(instance),
            "samples": [image for prompt in prompts for image in after[prompt]],
            "base": [image for prompt in prompts for image in before[prompt]],
            "class_before": before[class_prompt],
            "class_after": after[class_prompt],
        }
        [(_, seen)] = samplers.run([Call(method="glance", arguments=(encoder, sets, _texts(config)))])
        similarity, verdict = similarity_of(seen.images), judge(seen, prompts=len(prompts))
    return Evaluation(
        instance=tuple(instance),
        before=before,
        after=after,
        class_prompt=class_prompt,
        similarity=similarity,
        verdict=verdict,
    )


def _texts(config: DreamBoothConfig) -> list[str]:
    """The prompts without the identifier, which no CLIP knows."""
    noun = config.subject.class_noun
    return [EvaluationPrompt(text=text, application="").without_identifier(noun) for text in config.evaluation.prompts]


def sample_requests(
    config: DreamBoothConfig, base: Source, fine_tuned: Source, dtype: str
) -> list[tuple[Source, SampleRequest]]:
    """All samples of an evaluation, the base model's first."""
    class_prompt = config.prompts.class_prompt(config.subject)
    prompts = config.evaluation.prompts_of(config.subject, config.prompts)
    return [
        (source, request)
        for source in (base, fine_tuned)
        for prompt, count in [*((p, 1) for p in prompts), (class_prompt, 2)]
        for request in _requests(config, prompt, count * config.evaluation.images_per_prompt, dtype)
    ]


def _requests(config: DreamBoothConfig, prompt: str, count: int, dtype: str) -> list[SampleRequest]:
    """Sample requests with the same seeds for every prompt and model, so that pictures are comparable."""
    seeds = range(config.evaluation.seed, config.evaluation.seed + count)
    return [
        SampleRequest(
            prompts=(prompt,) * len(chunk),
            seeds=tuple(chunk),
            num_inference_steps=config.evaluation.num_inference_steps,
            guidance_scale=config.evaluation.guidance_scale,
            resolution=int(config.images.resolution or 0),
            dtype=dtype,
        )
        for start in range(0, count, _IMAGES_PER_REQUEST)
        for chunk in [seeds[start : start + _IMAGES_PER_REQUEST]]
    ]


def _sample(
    samplers: Samplers,
    requests: list[tuple[Source, SampleRequest]],
    on_progress: Callable[[int, int], None],
) -> list[list[bytes]]:
    total, made = sum(len(request.seeds) for _, request in requests), 0
    on_progress(made, total)
    pictures: list[list[bytes]] = [[] for _ in requests]
    for place, images in samplers.run([Call(method="samples", arguments=request) for request in requests]):
        pictures[place] = images
        made += len(images)
        on_progress(made, total)
    return pictures


def _by_prompt(
    requests: list[tuple[Source, SampleRequest]], pictures: list[list[bytes]], source: Source
) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for (of, request), images in zip(requests, pictures, strict=True):
        if of == source:
            found.setdefault(request.prompts[0], []).extend(images)
    return found


def instance_pictures(config: DreamBoothConfig, images: Sequence[InstanceImage], side: int) -> list[bytes]:
    """The instance images as PNG squares of `side` pixels, that of the samples they are compared with."""
    pictures = []
    for image in images:
        opened = open_image(image.address, max_pixels=config.images.max_pixels)
        pictures.append(png_bytes(_square(opened, side).picture))
    return pictures


def masked_pictures(config: DreamBoothConfig, images: Sequence[InstanceImage], side: int) -> list[MaskedPicture]:
    """Masked instance images as PNG squares of `side` pixels; none without masks."""
    pictures: list[MaskedPicture] = []
    most, cropped = config.images.max_pixels, config.images.masks == "crop"
    for image in images if config.images.masked else ():
        decoded = decode(read_image(image.address), image.address, max_pixels=most)
        mask = find_mask(image, decoded, max_pixels=most)
        if mask is None:
            continue
        subject = mask.box(at_least=1)
        square = _square(decoded.image, side, within=subject if cropped else None)
        inside = Image.fromarray(
            (cut_mask(mask.picture, square.box, (side, side), mirrored=False) * 255).astype(np.uint8)
        )
        alone = Image.composite(decoded.image, Image.new("RGB", decoded.image.size, "white"), mask.picture)
        pictures.append(
            MaskedPicture(
                picture=png_bytes(square.picture),
                mask=png_bytes(inside),
                alone=png_bytes(_square(alone, side, within=subject).picture),
            )
        )
    return pictures


def _square(image: Image.Image, side: int, within: Box | None = None) -> Cut:
    size = side, side
    [square] = cuts(image, size=size, crop="center", crops_per_image=1, flip=False, seed=0, within=within)
    return square
