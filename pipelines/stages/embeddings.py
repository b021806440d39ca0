"""DINO's embeddings of an evaluation, stored beside its figures, so that subjects can be compared with each other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.storage.files import join, write_bytes

if TYPE_CHECKING:
    from torch import Tensor


def embeddings_uri(evaluation_uri: str) -> str:
    """Address of the embeddings of an evaluation.json."""
    return join(evaluation_uri.rpartition("/")[0], "embeddings.safetensors")


def store_embeddings(evaluation_uri: str, *, samples: "Sequence[Tensor]", photographs: "Tensor") -> None:
    """Write embeddings of samples, tensors (N, D) in the order of their pictures, and of M photographs (M, D)."""
    import torch
    from safetensors.torch import save

    content = save({"samples": torch.cat(list(samples)), "photographs": photographs.contiguous()})
    write_bytes(embeddings_uri(evaluation_uri), content)


def read_embeddings(content: bytes) -> "tuple[Tensor, Tensor]":
    """(samples, photographs) as `store_embeddings` wrote them. Raises ValueError for another file, or part of one."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
        return tensors["samples"], tensors["photographs"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"no embeddings of an evaluation: {error}") from None
