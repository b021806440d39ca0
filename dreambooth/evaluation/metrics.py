"""The figures of an evaluation, as pure functions of embeddings, distances and colours.

DINO and CLIP-I are `similarity.mean_pairwise_similarity` by the bank's two image encoders (paper, section 4.1).
Embeddings may have any norm but zero. Raises ValueError for what can't be measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dreambooth.errors import InputError
from dreambooth.evaluation.similarity import directions, mean_pairwise_similarity

COPY_CLIP, COPY_PERCEPTUAL = 0.3, 0.25
"""Measured on the miniature's world, 20 drawn looks of five photographs each: tests/bench/near_copies.py."""

LEAST_SCALE = 0.1
"""Real images of one subject differ by 0.115 in CLIP-I (paper, table 1): less is a burst of one scene."""

FOLLOWED_HALF = 0.5


def fidelity(samples: Tensor, real: Tensor) -> Tensor:
    """Each sample's mean similarity to the real images: (N,) of (N, D) and (M, D); the mean is DINO or CLIP-I."""
    return _cosines(samples, real).mean(dim=1)


def prompt_similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Each image's cosine similarity to its own prompt: (N,) of (N, D) and (N, D), or of one prompt for all, (D,)."""
    images, texts = directions(images), directions(texts if texts.ndim == 2 else texts[None])
    check_width(images, texts)
    if len(texts) not in (1, len(images)):
        raise ValueError(f"expected a prompt for each of {len(images)} images, got {len(texts)}")
    return (images * texts).sum(dim=1)


def clip_t(images: Tensor, texts: Tensor) -> float:
    """CLIP-T: mean cosine similarity of images and their own prompts (paper, section 4.1)."""
    return float(prompt_similarity(images, texts).mean())


def pres(class_samples: Tensor, real: Tensor) -> float:
    """PRES: mean DINO similarity of the fine-tuned model's samples of the class prompt to the subject's real images.

    Lower is better: the class has not become the subject (paper, section 4.3, "Prior Preservation Loss Ablation").
    """
    return mean_pairwise_similarity(class_samples, real)


def div(distances: Tensor) -> float:
    """DIV: mean perceptual distance over pairs i < j of samples of one prompt, (N, N); higher is more varied.

    The paper's section 4.3 measures it with LPIPS. Raises ValueError for fewer than two samples.
    """
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"expected distances (N, N), got a tensor of shape {tuple(distances.shape)}")
    if len(distances) < 2:
        raise InputError(
            f"DIV needs at least 2 samples of a prompt, got {len(distances)}; ask for more images per prompt"
        )
    if not bool(torch.isfinite(distances).all()):
        raise ValueError("a distance isn't finite; was its image, or the model that made it, broken?")
    rows, columns = torch.triu_indices(len(distances), len(distances), offset=1)
    return float(distances.double()[rows, columns].mean())


def context_variance(fidelity_by_prompt: Sequence[float]) -> float:
    """Variance over prompts of the subject's fidelity: how much the subject changes with its context.

    One of the paper's three failures (section 4.5, "Limitations": context-appearance entanglement). Unbiased.
    """
    if len(fidelity_by_prompt) < 2:
        raise InputError(f"a variance over prompts needs at least 2 prompts, got {len(fidelity_by_prompt)}")
    return float(np.var(np.asarray(fidelity_by_prompt, dtype=np.float64), ddof=1))


def nearest(samples: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's nearest real image and the cosine similarity to it: (N,) indices and (N,)."""
    similarities, indices = _cosines(samples, real).max(dim=1)
    return indices, similarities


def near_copies(
    samples: Tensor,
    real: Tensor,
    *,
    distances: Tensor | None = None,
    real_distances: Tensor | None = None,
) -> Tensor:
    """Samples that copy a real image including the scene: (N,) bool of CLIP embeddings (N, D) and (M, D).

    Overfitting to the photographs is one of the paper's failures (section 4.5). A near-copy differs from a photograph
    by less than COPY_CLIP of what the photographs differ by among themselves (mean of 1 - cosine similarity), and,
    where perceptual distances to the real images (N, M) and among them (M, M) are given, by less than COPY_PERCEPTUAL
    of those too. Such a scale of the subject's own fits every bank, and CLIP sees the scene where DINO and the
    miniature's ViT are trained to see past it. Without distances a sample that shows the photograph's place anew also
    counts. One photograph has no scale: LEAST_SCALE stands in. So it does for a burst of one scene, whose perceptual
    scale would be next to nothing, too.
    """
    return nearly_same(samples, real, copy_scale(real, real_distances), distances=distances).any(dim=1)


@dataclass(frozen=True, kw_only=True)
class CopyScale:
    """What two pictures of a subject differ by at most when one copies the other: 1 - cosine, and perceptually.

    `perceptual` is None where photographs give no such scale.
    """

    cosine: float
    perceptual: float | None


def copy_scale(real: Tensor, real_distances: Tensor | None = None) -> CopyScale:
    """The scale of a subject, from embeddings of its M real images (M, D) and distances among them (M, M)."""
    among = _mean_of_pairs(1 - _cosines(real, real))
    perceptual = None
    if real_distances is not None and len(real) > 1:
        _check_shape(real_distances, (len(real), len(real)), "among the real images")
        perceptual = COPY_PERCEPTUAL * _mean_of_pairs(real_distances) if among >= LEAST_SCALE else None
    return CopyScale(cosine=COPY_CLIP * max(among, LEAST_SCALE), perceptual=perceptual)


def nearly_same(samples: Tensor, others: Tensor, scale: CopyScale, *, distances: Tensor | None = None) -> Tensor:
    """Which samples nearly are which other pictures: (N, M) bool of (N, D) and (M, D), and distances (N, M) if any."""
    close = 1 - _cosines(samples, others) < scale.cosine
    if distances is not None:
        _check_shape(distances, tuple(close.shape), "between the pictures")
        if scale.perceptual is not None:
            close &= distances < scale.perceptual
    return close


def prompt_followed(images: Tensor, base_images: Tensor, other_images: Tensor, text: Tensor) -> bool | None:
    """Whether a prompt's samples (N, D) follow it at least half as closely as the base model's own (B, D).

    Closeness is CLIP-T minus that of the base model's images of other prompts (O, D), the value of an image that
    ignores this prompt. None if the base model ignores the prompt too. "Prompt not followed" is the first of
    the paper's failures (section 4.5).
    """
    own, base, ignoring = (clip_t(each, text) for each in (images, base_images, other_images))
    return own - ignoring >= FOLLOWED_HALF * (base - ignoring) if base > ignoring else None


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    first, second = directions(first), directions(second)
    check_width(first, second)
    return first @ second.T


def _check_shape(distances: Tensor, shape: tuple[int, ...], where: str) -> None:
    if distances.shape != shape:
        raise InputError(f"expected distances {shape} {where}, got {tuple(distances.shape)}")


def _mean_of_pairs(table: Tensor) -> float:
    """Mean above the diagonal; 0 for one row."""
    count = len(table)
    return float((table.sum() - table.diagonal().sum()) / (count * (count - 1))) if count > 1 else 0.0


def background_leak(
    pixels: Tensor, subject_mask: Tensor, subject_colour: Tensor, *, least_contrast: float = 0.1
) -> float | None:
    """Shift of the subject's colour towards its background's: 0 for none, 1 for all the way.

    `pixels` (3, H, W) in [0, 1], `subject_mask` (H, W) bool, `subject_colour` (3,) the mean colour of the subject in
    the real images. The subject's mean colour in this sample, projected on the way from its true colour to the mean
    colour of everything outside the mask; negative when it moved away (paper, section 4.5: appearance entangled with
    context). None where the background is as good as the subject's own colour, nearer than `least_contrast`.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3 or subject_mask.shape != pixels.shape[1:]:
        raise InputError(
            f"expected pixels (3, H, W) and a mask (H, W), got {tuple(pixels.shape)} and {tuple(subject_mask.shape)}"
        )
    mask = subject_mask.bool()
    if not bool(mask.any()) or bool(mask.all()):
        raise InputError("expected a mask with both subject and background in it, got one of a single kind")
    pixels, true_colour = pixels.double(), subject_colour.double()
    moved = pixels[:, mask].mean(dim=1) - true_colour
    way = pixels[:, ~mask].mean(dim=1) - true_colour
    if float(way.norm()) < least_contrast:
        return None
    return float(moved @ way / (way @ way))


def check_width(first: Tensor, second: Tensor) -> None:
    """Raise InputError for embeddings of different widths, which come from two encoders."""
    if first.shape[-1] != second.shape[-1]:
        raise InputError(
            f"embeddings of width {first.shape[-1]} and {second.shape[-1]} can't be compared; use one encoder for both "
            f"(embeddings stored by another bank have to be made again)"
        )
