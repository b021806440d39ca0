"""Subject fidelity: the mean cosine similarity of embeddings over all pairs (paper, section 4.1, "Evaluation Metrics").

With embeddings by DINO ViT-S/16 it is the paper's DINO score, with CLIP's its CLIP-I.
"""

import torch
from torch import Tensor


def mean_pairwise_similarity(samples: Tensor, images: Tensor) -> float:
    """Mean cosine similarity over all pairs of a sample and a real image; it doesn't matter which set comes first.

    Embeddings are (N, D) and (M, D), of any norm but zero. Raises ValueError for an empty set, embeddings that hold NaN
    or infinity or have no direction, and sets of different widths.
    """
    samples, images = directions(samples), directions(images)
    if samples.shape[1] != images.shape[1]:
        raise ValueError(
            f"embeddings of width {samples.shape[1]} and {images.shape[1]} can't be compared; use one encoder for both"
        )
    return float((samples @ images.T).mean())


def mean_self_similarity(images: Tensor) -> float:
    """Mean cosine similarity over all pairs i < j of one set (N, D): the paper's row "Real Images".

    Raises ValueError for fewer than two embeddings, and as `mean_pairwise_similarity` does.
    """
    images = directions(images)
    if len(images) < 2:
        raise ValueError("expected at least 2 embeddings to compare with each other, got 1")
    rows, columns = torch.triu_indices(len(images), len(images), offset=1)
    return float((images @ images.T)[rows, columns].mean())


def directions(embeddings: Tensor) -> Tensor:
    """Embeddings scaled to unit norm, in float64."""
    if embeddings.ndim != 2:
        raise ValueError(f"expected embeddings (N, D), got a tensor of shape {tuple(embeddings.shape)}")
    if embeddings.numel() == 0:
        raise ValueError(f"expected at least one embedding, got a tensor of shape {tuple(embeddings.shape)}")
    if not bool(torch.isfinite(embeddings).all()):
        row = int((~torch.isfinite(embeddings)).any(dim=1).nonzero()[0])
        raise ValueError(f"the embedding at {row} isn't finite; was its image, or the model that made it, broken?")
    norms = embeddings.double().norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise ValueError(f"the embedding at {int((norms == 0).nonzero()[0][0])} is zero and has no direction")
    return torch.div(embeddings.double(), norms)
