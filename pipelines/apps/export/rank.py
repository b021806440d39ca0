"""The smallest rank whose LoRA keeps a model's fidelity, measured: DINO and CLIP-T of the bank, rank by rank.

Every rank is sampled from the same noise, so what differs is the weights. The loss of a rank is the larger of what DINO
and CLIP-T fall by against the whole model.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.errors import InputError

if TYPE_CHECKING:
    from dreambooth.models.low_rank import LowRank
    from dreambooth.training.best_checkpoint import Score

MOST_RANK = 128


@dataclass(frozen=True, kw_only=True)
class Point:
    """A rank of the curve, the size of its file in bytes, and its figures; the whole model has rank 0."""

    rank: int
    size: int
    dino: float
    clip_t: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Measured ranks in rising order, the whole model's figures, and the choice.

    With `embedding`, the identifier's embeddings were put in beside the LoRA.
    """

    whole: Point
    points: tuple[Point, ...]
    within: float
    bank: str
    embedding: bool
    rank: int

    def loss(self, point: Point) -> float:
        """The larger fall of DINO and CLIP-T."""
        return _loss(self.whole, point)

    def as_json(self) -> str:
        """All of it."""
        content: dict[str, Any] = {
            "bank": self.bank,
            "within": self.within,
            "embedding": self.embedding,
            "rank": self.rank,
            "whole": vars(self.whole),
            "points": [vars(point) | {"loss": self.loss(point)} for point in self.points],
        }
        return json.dumps(content, indent=2) + "\n"


def choose_rank(
    found: "LowRank",
    *,
    within: float,
    bank: str,
    score: Callable[[int | None, bool], "Score"],
    size_of: Callable[[int], int],
    say: Callable[[str], None] = lambda line: None,
) -> Curve:
    """Measure ranks 1, 2, 4, … until one loses no more than `within`, then halve the gap to the one before.

    So it is the smallest such rank where a higher one loses no more than a lower one.
    `score(rank, embedding)` measures a rank, None the whole model; `size_of` is the bytes of a file. Where the
    highest rank alone loses more, the identifier's embeddings are put in. Raises InputError if that isn't enough.
    """

    def measured(rank: int | None, embedding: bool) -> Point:
        figures = score(rank, embedding)
        point = Point(rank=rank or 0, size=size_of(rank or 0), dino=figures.dino, clip_t=figures.clip_t)
        what = "the whole model" if rank is None else f"rank {rank}{' and embedding' if embedding else ''}"
        say(f"{what}: DINO {point.dino:.3f}, CLIP-T {point.clip_t:.3f}")
        return point

    whole = measured(None, False)
    ranks = list(_ranks(found))
    embedding, best = False, measured(ranks[-1], False)
    if _loss(whole, best) > within and found.embeddings:
        alone, embedding, best = best, True, measured(ranks[-1], True)
        if _loss(whole, best) > within:
            best = min(alone, best, key=lambda point: _loss(whole, point))
    if _loss(whole, best) > within:
        raise InputError(
            f"no LoRA up to rank {ranks[-1]} keeps the model's figures within {within:g}: the nearest has DINO "
            f"{best.dino:.3f} against {whole.dino:.3f} and CLIP-T {best.clip_t:.3f} against {whole.clip_t:.3f}; allow "
            f"--within {_loss(whole, best):.3f}, or export with --format single-file"
        )
    points, lost = {ranks[-1]: best}, 0
    for chosen in ranks:
        if chosen not in points:
            points[chosen] = measured(chosen, embedding)
        if _loss(whole, points[chosen]) <= within:
            break
        lost = chosen
    while chosen - lost > 1:  # between the last power of two that loses more, and the first that doesn't
        middle = (lost + chosen) // 2
        points[middle] = measured(middle, embedding)
        if _loss(whole, points[middle]) <= within:
            chosen = middle
        else:
            lost = middle
    curve = tuple(points[rank] for rank in sorted(points))
    return Curve(whole=whole, points=curve, within=within, bank=bank, embedding=embedding, rank=chosen)


def draw(curve: Curve, path: Path) -> None:
    """The curve as a picture: DINO and CLIP-T over the rank, the whole model's as lines, the bound as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    ranks = [point.rank for point in curve.points]
    for name, values, whole, colour in (
        ("DINO", [point.dino for point in curve.points], curve.whole.dino, "C0"),
        ("CLIP-T", [point.clip_t for point in curve.points], curve.whole.clip_t, "C1"),
    ):
        axes.plot(ranks, values, "o-", color=colour, label=name)
        axes.axhline(whole, color=colour, linestyle="--", linewidth=1)
        axes.axhspan(whole - curve.within, whole, color=colour, alpha=0.12)
    axes.axvline(curve.rank, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [f"{point.rank}\n{point.size / 1e6:.1f} MB" for point in curve.points])
    axes.set_xlabel("rank, and size of the file")
    axes.set_ylabel(f"figures by the bank {curve.bank}")
    axes.set_title(f"rank {curve.rank} loses no more than {curve.within:g} (dashed: the whole model)")
    axes.legend()
    figure.savefig(path, dpi=120)


def _ranks(found: "LowRank") -> Iterator[int]:
    """Powers of two, the last of which every layer's own rank is below, or `found.rank`."""
    largest = max((len(layer.down) for layer in found.layers), default=1)
    rank = 1
    while rank < min(largest, found.rank):
        yield rank
        rank *= 2
    yield rank


def _loss(whole: Point, point: Point) -> float:
    return max(whole.dino - point.dino, whole.clip_t - point.clip_t)
