"""The order of training pairs, and the random draws of each.

A training run is a row of numbered pairs (one instance image, one class image). Global batch `step` holds the pairs
[step * G, (step + 1) * G), G = micro_batch_size * gradient_accumulation_steps * workers. Everything about a pair (which
images, which crop, with text or without, posterior noise, noise, timestep) follows from the seed and its number, so
workers and accumulation only decide who computes it, and resuming needs only the step.

Instance images may have several sizes; those of a micro batch have one, which follows from its pairs' numbers, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from dreambooth.data.latents import LatentCache
from dreambooth.data.order import turn_of
from dreambooth.models.families import Family, Tensors
from dreambooth.models.process import Process
from dreambooth.randomness import generator


class Batch(NamedTuple):
    """The model's input of one micro step; instance half first, class half second.

    latents and noise (2B, C, H, W), timesteps (2B,) of the noise process, and named tensors (2B, ...): text (token ids,
    or the states of frozen text encoders) and conditions of the denoiser besides it. `mask` (B, 1, H, W) weighs the
    loss of the instance half; None: all alike. Where the halves may differ in size, the class half is a batch of its
    own, `class_half`, and the first dimension of all others is B.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: Tensors
    conditions: Tensors
    mask: Tensor | None = None
    class_half: Optional["Batch"] = None

    def to(self, device: str) -> "Batch":
        """This batch on a device."""
        return self.mapped(lambda _, part: part.to(device, non_blocking=True))

    def mapped(self, function: Callable[[str, Tensor], Tensor]) -> "Batch":
        """A batch of what a function of its name makes of each tensor."""
        latents, noise, timesteps, text, conditions, mask, class_half = self
        return Batch(
            function("latents", latents),
            function("noise", noise),
            function("timesteps", timesteps),
            {name: function(f"text {name}", part) for name, part in text.items()},
            {name: function(f"condition {name}", part) for name, part in conditions.items()},
            None if mask is None else function("mask", mask),
            None if class_half is None else class_half.mapped(lambda name, part: function(f"class {name}", part)),
        )


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images of one size: the latents of N images with V crops each, image by image, and their text.

    latents and conditions hold N * V entries; text is (N, ...), or (1, ...) where all images share a prompt. `repeats`
    says how often each image comes up in an epoch; empty: once. `masks` (N * V, 1, H, W) weigh the loss of each crop,
    by 1 on average over those of an image. `process` draws their moments; None: the `TrainingData`'s.
    """

    latents: LatentCache
    text: Tensors
    conditions: Tensors = field(default_factory=dict)
    crops: int = 1
    repeats: tuple[int, ...] = ()
    masks: Tensor | None = None
    process: Process | None = None

    def __len__(self) -> int:
        return len(self.latents) // self.crops

    @cached_property
    def turns(self) -> tuple[int, ...]:
        """The images of an epoch, before they are shuffled."""
        repeats = self.repeats or (1,) * len(self)
        return tuple(image for image, times in enumerate(repeats) for _ in range(times))

    @property
    def shape(self) -> torch.Size:
        """(C, H, W) of each."""
        return self.latents.mean.shape[1:]

    def text_of(self, image: int) -> Tensors:
        """Text of one image."""
        return {name: part[image % len(part)] for name, part in self.text.items()}

    def conditions_of(self, entry: int) -> Tensors:
        """Conditions of one crop."""
        return {name: part[entry] for name, part in self.conditions.items()}


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Instance images and, with prior preservation, class images.

    A share `caption_dropout` of pairs, both halves, has the text `no_text` (without a batch axis) instead of its own.
    `other_sizes` holds instance images that differ in size from those in `instance`, by size; pairs are then asked for
    by micro batches of `micro_batch_size`.
    """

    family: Family
    process: Process
    instance: ImageSet
    class_: ImageSet | None
    seed: int
    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    no_text: Tensors = field(default_factory=dict)
    other_sizes: tuple[ImageSet, ...] = ()
    micro_batch_size: int = 1

    @property
    def buckets(self) -> tuple[ImageSet, ...]:
        """Instance images by size."""
        return self.instance, *self.other_sizes

    @cached_property
    def halves_apart(self) -> bool:
        """Whether the halves of a batch may differ in size.

        Then no batch has them in one: workers whose denoiser is sharded have to call it equally often.
        """
        return self.class_ is not None and any(images.shape != self.class_.shape for images in self.buckets)

    @property
    def runs_text_encoders(self) -> bool:
        """Whether a step runs text encoders: then the text holds token ids."""
        return any(name.endswith(".input_ids") for name in self.instance.text)

    def batch(self, pairs: range) -> Batch:
        """The batch of these pairs, the same on every rank. Raises ValueError for pairs of several micro batches."""
        instance = [self._draw(0, self.buckets, pair) for pair in pairs]
        class_ = [] if self.class_ is None else [self._draw(1, (self.class_,), pair) for pair in pairs]
        if len({one.latents.shape for one in instance}) > 1:
            raise ValueError(f"pairs {pairs} aren't of one micro batch of {self.micro_batch_size}, nor of one size")
        masks = [one.mask for one in instance if one.mask is not None]
        mask = torch.stack(masks) if masks else None
        if self.halves_apart:
            return _batch(instance)._replace(mask=mask, class_half=_batch(class_))
        return _batch([*instance, *class_])._replace(mask=mask)

    def _draw(self, half: int, sets: Sequence[ImageSet], pair: int) -> "_Drawn":
        turns = [len(images.turns) for images in sets]
        bucket, turn = turn_of(self.seed, half, pair, turns, self.micro_batch_size)
        images = sets[bucket]
        image, process = images.turns[turn], images.process or self.process
        rng = generator(self.seed, "pair", half, pair)
        entry = image * images.crops + int(torch.randint(images.crops, (), generator=rng))
        shape = images.shape
        latents = images.latents.sample(entry, torch.randn(shape, generator=rng))
        noise = torch.randn(shape, generator=rng)
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn(shape[0], 1, 1, generator=rng)
        timestep = process.draw(rng)
        return _Drawn(
            latents=latents,
            noise=noise,
            timestep=timestep,
            text=self.no_text if self._drops_text(pair) else images.text_of(image),
            conditions=self.family.draw_conditions(process, latents, images.conditions_of(entry), rng),
            mask=None if images.masks is None else images.masks[entry],
        )

    def _drops_text(self, pair: int) -> bool:
        """Whether a pair is trained without text, drawn apart from all else."""
        if not self.caption_dropout:
            return False
        rng = generator(self.seed, "caption dropout", pair)
        return float(torch.rand((), generator=rng)) < self.caption_dropout


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """One image of a batch; all without the batch axis."""

    latents: Tensor
    noise: Tensor
    timestep: Tensor
    text: Tensors
    conditions: Tensors
    mask: Tensor | None


def _batch(drawn: Sequence[_Drawn]) -> Batch:
    """A batch of images of one size, without masks."""
    return Batch(
        torch.stack([one.latents for one in drawn]),
        torch.stack([one.noise for one in drawn]),
        torch.stack([one.timestep for one in drawn]),
        _stacked([one.text for one in drawn]),
        _stacked([one.conditions for one in drawn]),
    )


def _stacked(parts: Sequence[Tensors]) -> Tensors:
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def pairs_of(
    step: int, micro_step: int, rank: int, *, micro_batch_size: int, accumulation: int, world_size: int
) -> range:
    """Pairs of a rank in one micro step; over ranks and micro steps they tile the global batch."""
    micro_batch = (step * accumulation + micro_step) * world_size + rank
    return range(micro_batch * micro_batch_size, (micro_batch + 1) * micro_batch_size)
