"""The order of training pairs, and the random draws of each.

A training run is a row of numbered pairs (one instance image, one class image). Global batch `step` holds the pairs
[step * G, (step + 1) * G), G = micro_batch_size * gradient_accumulation_steps * workers. Everything about a pair (which
images, which crop, with text or without, posterior noise, noise, timestep) follows from the seed and its number, so
workers and accumulation only decide who computes it, and resuming needs only the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dreambooth.data.latents import LatentCache
from dreambooth.models.families import Family, Tensors
from dreambooth.models.process import Process
from dreambooth.randomness import generator


class Batch(NamedTuple):
    """The model's input of one micro step; instance half first, class half second.

    latents and noise (2B, C, H, W), timesteps (2B,) of the noise process, and named tensors (2B, ...): text (token ids,
    or the states of frozen text encoders) and conditions of the denoiser besides it. `mask` (B, 1, H, W) weighs the
    loss of the instance half; None: all alike.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: Tensors
    conditions: Tensors
    mask: Tensor | None = None

    def to(self, device: str) -> "Batch":
        """This batch on a device."""
        return self.mapped(lambda _, part: part.to(device, non_blocking=True))

    def mapped(self, function: Callable[[str, Tensor], Tensor]) -> "Batch":
        """A batch of what a function of its name makes of each tensor."""
        latents, noise, timesteps, text, conditions, mask = self
        return Batch(
            function("latents", latents),
            function("noise", noise),
            function("timesteps", timesteps),
            {name: function(f"text {name}", part) for name, part in text.items()},
            {name: function(f"condition {name}", part) for name, part in conditions.items()},
            None if mask is None else function("mask", mask),
        )


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """One half of the data: the latents of N images with V crops each, image by image, and their text.

    latents and conditions hold N * V entries; text is (N, ...), or (1, ...) where all images share a prompt. `repeats`
    says how often each image comes up in an epoch; empty: once. `masks` (N * V, 1, H, W) weigh the loss of each crop,
    by 1 on average over those of an image.
    """

    latents: LatentCache
    text: Tensors
    conditions: Tensors = field(default_factory=dict)
    crops: int = 1
    repeats: tuple[int, ...] = ()
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents) // self.crops

    @cached_property
    def turns(self) -> tuple[int, ...]:
        """The images of an epoch, before they are shuffled."""
        repeats = self.repeats or (1,) * len(self)
        return tuple(image for image, times in enumerate(repeats) for _ in range(times))

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
    """

    family: Family
    process: Process
    instance: ImageSet
    class_: ImageSet | None
    seed: int
    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    no_text: Tensors = field(default_factory=dict)

    @property
    def runs_text_encoders(self) -> bool:
        """Whether a step runs text encoders: then the text holds token ids."""
        return any(name.endswith(".input_ids") for name in self.instance.text)

    def batch(self, pairs: range) -> Batch:
        """The batch of these pairs, the same on every rank."""
        halves = [self.instance] if self.class_ is None else [self.instance, self.class_]
        drawn = [self._draw(half, images, pair) for half, images in enumerate(halves) for pair in pairs]
        entries, latents, noise, timesteps, text, conditions = zip(*drawn, strict=True)
        masks = self.instance.masks
        return Batch(
            torch.stack(latents),
            torch.stack(noise),
            torch.stack(timesteps),
            _stacked(text),
            _stacked(conditions),
            None if masks is None else masks[list(entries[: len(pairs)])],
        )

    def _draw(self, half: int, images: ImageSet, pair: int) -> tuple[int, Tensor, Tensor, Tensor, Tensors, Tensors]:
        epoch, place = divmod(pair, len(images.turns))
        image = images.turns[_permutation(self.seed, half, epoch, len(images.turns))[place]]
        rng = generator(self.seed, "pair", half, pair)
        entry = image * images.crops + int(torch.randint(images.crops, (), generator=rng))
        shape = images.latents.mean.shape[1:]
        latents = images.latents.sample(entry, torch.randn(shape, generator=rng))
        noise = torch.randn(shape, generator=rng)
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn(shape[0], 1, 1, generator=rng)
        timestep = self.process.draw(rng)
        conditions = self.family.draw_conditions(self.process, latents, images.conditions_of(entry), rng)
        text = self.no_text if self._drops_text(pair) else images.text_of(image)
        return entry, latents, noise, timestep, text, conditions

    def _drops_text(self, pair: int) -> bool:
        """Whether a pair is trained without text, drawn apart from all else."""
        if not self.caption_dropout:
            return False
        rng = generator(self.seed, "caption dropout", pair)
        return float(torch.rand((), generator=rng)) < self.caption_dropout


def _stacked(parts: Sequence[Tensors]) -> Tensors:
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


@lru_cache(maxsize=64)
def _permutation(seed: int, half: int, epoch: int, length: int) -> list[int]:
    permutation: list[int] = torch.randperm(length, generator=generator(seed, "order", half, epoch)).tolist()
    return permutation


def pairs_of(
    step: int, micro_step: int, rank: int, *, micro_batch_size: int, accumulation: int, world_size: int
) -> range:
    """Pairs of a rank in one micro step; over ranks and micro steps they tile the global batch."""
    micro_batch = (step * accumulation + micro_step) * world_size + rank
    return range(micro_batch * micro_batch_size, (micro_batch + 1) * micro_batch_size)
