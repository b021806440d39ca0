"""Masked patch similarity: how much of a photograph's subject is found in a sample, patch by patch, wherever it is.

For every patch of the photograph's subject, the greatest cosine similarity among all patches of the sample; then the
mean over the subject's patches. So MaSC defines it (arXiv 2605.22469, "masked-maxcos"), for SigLIP 2's patches. One way
only, since a sample has no mask: the other way, its surroundings would count against it, which the prompt asks for.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MaskedPhotograph:
    """A photograph and the mask of its subject, mode L, white where that is, both of one size."""

    picture: Image.Image
    mask: Image.Image


def subject_patches(mask: Image.Image, size: int) -> Tensor:
    """Which patches of `size` pixels, row by row, are more than half the subject's: (patches,) bool of a mask."""
    height, width = mask.height // size, mask.width // size
    pixels = np.asarray(mask, dtype=np.float32)[: height * size, : width * size] / 255
    shares = pixels.reshape(height, size, width, size).mean(axis=(1, 3))
    return torch.from_numpy(shares.reshape(-1) > 0.5)


def masked_patch_similarity(samples: Tensor, subject: Tensor) -> Tensor:
    """(N,) of the samples' patches (N, P, D) and the K patches of one photograph's subject (K, D), all of unit norm."""
    return (subject @ samples.transpose(1, 2)).amax(dim=2).mean(dim=1)  # (N, K, P) in between
