"""Counter-based randomness: a draw depends on the seed and its purpose, never on earlier draws.

A single running generator would have to be restored on resume, and every worker would need its own. Here the pairs of
a whole training run are numbered, and pair 4711 gets the same noise on one worker or eight, after a crash or without.
"""

import hashlib

import torch


def generator(*counters: int | str) -> torch.Generator:
    """A CPU generator for these counters, such as (seed, "noise", pair). Different counters give unrelated streams."""
    digest = hashlib.blake2b(repr(counters).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
