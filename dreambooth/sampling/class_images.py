"""The class images of prior preservation: keys of sets, missing images, and sampling.

Two sets are the same if everything that decides their pixels is: base model, class prompt, sampler, steps,
guidance, resolution, dtype, seed, and how many images are sampled together (a batch's shape can change the last bits of
floats). The hash of this recipe is the set's key, so subjects of one class share a set, and a request for more images
tops it up.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dreambooth.amounts import counted
from dreambooth.config.settings import PriorConfig

if TYPE_CHECKING:
    from dreambooth.sampling.graphs import Graphs
    from dreambooth.sampling.pictures import Pictures

STORED = 2
"""Version in the key of all stored pictures. Raise it when earlier code may have stored pictures under a wrong key:
those of version 1 may be another base model's or of another dtype."""


@dataclass(frozen=True, kw_only=True)
class PriorPlan:
    """Everything that decides the pixels of a set of class images, and the number wanted."""

    base_hash: str
    class_prompt: str
    resolution: int
    num_inference_steps: int
    guidance_scale: float
    batch_size: int
    seed: int
    dtype: str
    count: int
    sampler: str

    @cached_property
    def recipe(self) -> str:
        """20 hex digits of the sha256 over all but the count; part of the keys of models trained on the set."""
        identity = {name: value for name, value in asdict(self).items() if name != "count"}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]

    @cached_property
    def key(self) -> str:
        """Folder name of the set: 20 hex digits of the sha256 over its recipe and `STORED`."""
        return hashlib.sha256(f"{self.recipe} {STORED}".encode()).hexdigest()[:20]

    def blocks(self, present: Iterable[str] = ()) -> list[range]:
        """Blocks with missing images; each block is always sampled together."""
        have = set(present)
        starts = range(0, self.count, self.batch_size)
        blocks = [range(start, start + self.batch_size) for start in starts]
        return [block for block in blocks if any(image_name(i) not in have for i in block if i < self.count)]

    def missing(self, present: Iterable[str]) -> list[int]:
        """Indices of missing images."""
        have = set(present)
        return [index for index in range(self.count) if image_name(index) not in have]


def prior_plan(
    config: PriorConfig, *, base_hash: str, class_prompt: str, resolution: int, dtype: str, sampler: str
) -> PriorPlan:
    """The plan of a run's class images; `sampler` is the `Family.sampler_name` of its base model."""
    return PriorPlan(
        base_hash=base_hash,
        class_prompt=class_prompt,
        resolution=resolution,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        batch_size=config.batch_size,
        seed=config.seed,
        dtype=dtype,
        count=config.num_class_images,
        sampler=sampler,
    )


def image_name(index: int) -> str:
    """File name of a class image."""
    return f"{index:06d}.png"


def image_seed(plan: PriorPlan, index: int) -> int:
    """Seed of one class image, from the set's recipe and the image's index alone."""
    return int.from_bytes(hashlib.sha256(f"{plan.recipe}/{index}".encode()).digest()[:7], "big")


def generate_block(pipeline: Any, plan: PriorPlan, block: range, graphs: "Graphs | None" = None) -> "Pictures":
    """Sample all images of a block together, so that they don't depend on which were missing.

    `graphs` as in `sample`. Raises torch.OutOfMemoryError, with the cure, where so many don't fit a GPU.
    """
    import torch

    from dreambooth.sampling.sampler import sampled

    batches = sampled(
        pipeline,
        [plan.class_prompt] * len(block),
        [image_seed(plan, index) for index in block],
        num_inference_steps=plan.num_inference_steps,
        guidance_scale=plan.guidance_scale,
        height=plan.resolution,
        width=plan.resolution,
        batch_size=len(block),
        dtype=getattr(torch, plan.dtype),
        graphs=graphs,
        smaller=False,  # the size of a batch is in the set's key
    )
    try:
        [pictures] = batches
    except torch.OutOfMemoryError as error:
        size = counted(len(block), "class image")
        cure = f"{size} at once won't fit the GPU; set prior.batch_size to {max(1, len(block) // 2)}"
        raise torch.OutOfMemoryError(f"{cure}: {error}") from error
    return pictures
