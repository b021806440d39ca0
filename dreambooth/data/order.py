"""The order of a half's images over numbered pairs, with the pairs of a micro batch from one bucket.

A turn is one coming-up of an image in an epoch. Of buckets with n_1 ... n_k turns, N in all, and micro batches of B
pairs, a round is N micro batches: n_i of them from bucket i, in an order of its own, together B epochs of each bucket.
So in every round each turn comes up B times, whatever the buckets; with one bucket a round is no more than B epochs.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

from dreambooth.randomness import generator


def turn_of(seed: int, half: int, pair: int, turns: Sequence[int], micro_batch_size: int) -> tuple[int, int]:
    """The (bucket, turn in it) of a pair; `turns` are those of each bucket."""
    micro_batch, within = divmod(pair, micro_batch_size)
    # Micro batches have the same pairs for any number of workers, so the buckets do, too.
    round_, place = divmod(micro_batch, sum(turns))
    bucket, earlier = _round(seed, half, round_, tuple(turns))[place]
    count = turns[bucket]
    epoch, place = divmod((round_ * count + earlier) * micro_batch_size + within, count)
    return bucket, _permutation(seed, half, bucket, epoch, count)[place]


@lru_cache(maxsize=64)
def _round(seed: int, half: int, round_: int, turns: tuple[int, ...]) -> list[tuple[int, int]]:
    """(bucket, earlier micro batches of it in the round) of each micro batch in a round."""
    of_turn = [bucket for bucket, count in enumerate(turns) for _ in range(count)]
    if len(turns) > 1:
        of_turn = [of_turn[i] for i in torch.randperm(len(of_turn), generator=generator(seed, "bucket", half, round_))]
    seen = [0] * len(turns)
    placed = []
    for bucket in of_turn:
        placed.append((bucket, seen[bucket]))
        seen[bucket] += 1
    return placed


@lru_cache(maxsize=64)
def _permutation(seed: int, half: int, bucket: int, epoch: int, length: int) -> list[int]:
    further = (bucket,) if bucket else ()  # one bucket's order is that without buckets
    rng = generator(seed, "order", half, epoch, *further)
    permutation: list[int] = torch.randperm(length, generator=rng).tolist()
    return permutation
