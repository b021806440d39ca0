"""Randomness by counting: what is drawn depends on the seed and on what it is drawn for, never on what came before.

Why not one generator that runs along? Because a resume would have to restore it, and because every worker would need
its own. Here the pairs of a whole training run are numbered, whoever trains on them, and pair 4711 meets the same noise
on one worker or eight, after a crash or without one.
"""

import hashlib

import torch


def generator(*counters: int | str) -> torch.Generator:
    """A CPU generator for these counters, such as (seed, "noise", pair). Different counters give unrelated streams."""
    digest = hashlib.blake2b(repr(counters).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
