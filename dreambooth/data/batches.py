"""The order of training pairs, and the random draws of each.

A training run is a row of numbered pairs (one instance image, one class image). Global batch `step` holds the pairs
[step * G, (step + 1) * G), G = micro_batch_size * gradient_accumulation_steps * workers. Everything about a pair (which
images, which crop, posterior noise, noise, timestep) follows from the seed and its number, so workers and accumulation
only decide who computes it, and resuming needs only the step.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dreambooth.data.latents import LatentCache
from dreambooth.randomness import generator


class Batch(NamedTuple):
    """The model's input of one micro step; instance half first, class half second.

    latents and noise (2B, C, H, W), timesteps (2B,), text: input_ids (2B, L) or encoder_hidden_states (2B, L, D).
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: Tensor


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """One half of the data: the latents of N images with V crops each, image by image, and their text.

    latents holds N * V entries; text is (N, ...), or (1, ...) where all images share a prompt.
    """

    latents: LatentCache
    text: Tensor
    crops: int = 1

    def __len__(self) -> int:
        return len(self.latents) // self.crops


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Instance images and, with prior preservation, class images."""

    instance: ImageSet
    class_: ImageSet | None
    seed: int
    num_train_timesteps: int
    noise_offset: float = 0.0

    def batch(self, pairs: range) -> Batch:
        """The batch of these pairs, the same on every rank."""
        halves = [self.instance] if self.class_ is None else [self.instance, self.class_]
        drawn = [self._draw(half, images, pair) for half, images in enumerate(halves) for pair in pairs]
        return Batch(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))

    def _draw(self, half: int, images: ImageSet, pair: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        epoch, place = divmod(pair, len(images))
        image = _permutation(self.seed, half, epoch, len(images))[place]
        rng = generator(self.seed, "pair", half, pair)
        crop = int(torch.randint(images.crops, (), generator=rng))
        shape = images.latents.mean.shape[1:]
        latents = images.latents.sample(image * images.crops + crop, torch.randn(shape, generator=rng))
        noise = torch.randn(shape, generator=rng)
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn(shape[0], 1, 1, generator=rng)
        timestep = torch.randint(self.num_train_timesteps, (), generator=rng)
        return latents, noise, timestep, images.text[image % len(images.text)]


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
