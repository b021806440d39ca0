"""Memory of a GPU that samples: a pipeline's weights, and what a batch takes beside them."""

from collections.abc import Sequence
from typing import Any

from dreambooth.models.base_model import BaseModel
from pipelines.plan.counted import counted


def weights_bytes(bases: Sequence[BaseModel]) -> int:
    """Weights of a pipeline of these stages: fp16, and the VAE in fp32.

    A second stage shares the first one's text encoders.
    """
    size = 0
    for base in bases:
        for folder, count in base.parameter_counts.items():
            role = base.family.component(folder).role
            if base is bases[0] or role != "text_encoder":
                size += (4 if role == "vae" else 2) * count
    return size


def batch_bytes(base: BaseModel, side: int, *, images: int, guided: bool) -> int:
    """Bytes beyond the weights of sampling so many square images of `side` pixels together."""
    asked: dict[str, Any] = {"size": (side, side), "images": images, "guided": guided}

    def count() -> int:
        from dreambooth.training.sampling_memory import sampling_memory

        return sampling_memory(base.directory, **asked)

    return int(counted("sampling-memory", base, asked, count))
