"""Retrieval: is the photograph nearest to a sample one of its own subject, among the photographs of all subjects?

DINO's similarities of a sample to the own subject's photographs say how alike they are; retrieval says whether they are
more alike than those of others. A tie with another subject's photograph counts against the sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreambooth.errors import InputError
from dreambooth.evaluation.similarity import directions


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """The samples of S subjects looked up in the photographs of all of them; every tuple has S values, in their order.

    `rank_1` is the share of samples whose nearest photograph is their subject's, `mean_average_precision` the mean over
    samples of the average precision at the own photographs' ranks. Row i of `confusion` counts samples of subject i by
    the subject of their nearest photograph.
    """

    rank_1: tuple[float, ...]
    mean_average_precision: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]


def retrieve(samples: Sequence[Tensor], photographs: Sequence[Tensor]) -> Retrieved:
    """Look up each subject's samples, (N, D), in the photographs, (M, D), of all subjects, by cosine similarity.

    Raises InputError for fewer than two subjects, and for embeddings that aren't finite or of several widths.
    """
    if len(samples) < 2 or len(samples) != len(photographs):
        raise InputError(
            f"retrieval needs samples and photographs of at least 2 subjects, got {len(samples)} and {len(photographs)}"
        )
    widths = {each.shape[-1] for each in (*samples, *photographs)}
    if len(widths) > 1:
        raise InputError(f"embeddings of one encoder can be compared, got widths {sorted(widths)}")
    gallery = torch.cat([_directions(each) for each in photographs])  # (G, D)
    subject_of = torch.cat([torch.full((len(each),), place) for place, each in enumerate(photographs)])  # (G,)
    rank_1, precision, confusion = [], [], []
    for place, of_subject in enumerate(samples):
        similarities = _directions(of_subject) @ gallery.T  # (N, G)
        nearest = _nearest_subject(similarities, subject_of, place, len(samples))
        rank_1.append(float((nearest == place).double().mean()))
        precision.append(float(_average_precision(similarities, subject_of == place).mean()))
        confusion.append(tuple(torch.bincount(nearest, minlength=len(samples)).tolist()))
    return Retrieved(rank_1=tuple(rank_1), mean_average_precision=tuple(precision), confusion=tuple(confusion))


def _directions(embeddings: Tensor) -> Tensor:
    try:
        return directions(embeddings)
    except ValueError as error:
        raise InputError(f"a subject's embeddings: {error}") from None


def _nearest_subject(similarities: Tensor, subject_of: Tensor, own: int, subjects: int) -> Tensor:
    """The subject of each sample's nearest photograph: (N,)."""
    best = similarities.new_full((len(similarities), subjects), -torch.inf)
    best = best.scatter_reduce(1, subject_of.expand(len(similarities), -1), similarities, "amax")  # (N, S)
    of_own = best[:, own].clone()
    best[:, own] = -torch.inf
    of_others, other = best.max(dim=1)
    return torch.where(of_own > of_others, own, other)


def _average_precision(similarities: Tensor, own: Tensor) -> Tensor:
    """Average precision of each sample, (N,), by similarities (N, G) to photographs of which some are its own (G,)."""
    of_own = similarities[:, own].sort(dim=1, descending=True).values  # (N, M)
    ahead = torch.stack([(similarities[:, ~own] >= each[:, None]).sum(dim=1) for each in of_own.T], dim=1)  # (N, M)
    places = torch.arange(1, of_own.shape[1] + 1)
    return (places / (places + ahead)).double().mean(dim=1)
