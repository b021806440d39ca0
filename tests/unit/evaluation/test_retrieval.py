"""Retrieval against a recomputation in numpy that sorts whole rankings, and what can't be looked up."""

import numpy as np
import pytest
import torch

from dreambooth.errors import InputError
from dreambooth.evaluation.retrieval import retrieve


def by_sorting(samples: list[np.ndarray], photographs: list[np.ndarray]) -> tuple[list[float], list[float], np.ndarray]:
    """Rank-1, mean average precision, confusion by the whole ranking of every sample, others first among equals."""
    gallery = np.concatenate(photographs)
    gallery = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    owner = np.repeat(np.arange(len(photographs)), [len(each) for each in photographs])
    rank_1, precision = [], []
    confusion = np.zeros((len(samples), len(samples)), dtype=int)
    for own, of_subject in enumerate(samples):
        hits, precisions = [], []
        for sample in of_subject / np.linalg.norm(of_subject, axis=1, keepdims=True):
            order = np.lexsort((owner == own, -(gallery @ sample)))
            ranked = owner[order]
            confusion[own, ranked[0]] += 1
            hits.append(ranked[0] == own)
            ranks = np.flatnonzero(ranked == own) + 1
            precisions.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
        rank_1.append(float(np.mean(hits)))
        precision.append(float(np.mean(precisions)))
    return rank_1, precision, confusion


def subjects(seed: int, spread: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Samples and photographs, of different numbers, around a direction of each of seven subjects."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(7, 16, generator=generator)

    def around(centre: torch.Tensor, count: int) -> torch.Tensor:
        return centre + spread * torch.randn(count, 16, generator=generator)

    photographs = [around(centre, 1 + place % 4) for place, centre in enumerate(centres)]
    return [around(centre, 3 + place) for place, centre in enumerate(centres)], photographs


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_it_is_what_sorting_every_ranking_gives(spread: float) -> None:
    samples, photographs = subjects(1, spread)
    found = retrieve(samples, photographs)
    rank_1, precision, confusion = by_sorting(
        *([each.double().numpy() for each in all_] for all_ in (samples, photographs))
    )
    assert found.rank_1 == pytest.approx(rank_1)
    assert found.mean_average_precision == pytest.approx(precision)
    assert [list(row) for row in found.confusion] == confusion.tolist()
    if spread < 0.1:
        assert set(found.rank_1) == {1.0} == set(found.mean_average_precision)
    else:
        assert len(set(found.rank_1)) > 1


def test_equal_photographs_of_two_subjects_are_no_hit() -> None:
    photograph, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    found = retrieve([photograph, photograph, other], [photograph, photograph, other])
    assert found.rank_1 == (0.0, 0.0, 1.0)
    assert found.mean_average_precision == (0.5, 0.5, 1.0)
    assert found.confusion == ((0, 1, 0), (1, 0, 0), (0, 0, 1))


def test_what_cannot_be_looked_up() -> None:
    one = torch.ones(2, 3)
    with pytest.raises(InputError, match="at least 2 subjects, got 1 and 1"):
        retrieve([one], [one])
    with pytest.raises(InputError, match=r"got widths \[3, 4\]"):
        retrieve([one, one], [one, torch.ones(1, 4)])
    with pytest.raises(InputError, match="the embedding at 1 isn't finite"):
        retrieve([one, torch.tensor([[1.0, 1.0, 1.0], [1.0, torch.nan, 1.0]])], [one, one])
