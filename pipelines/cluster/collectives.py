"""Exchange objects between the ranks of a worker group. Collective: call on every rank."""

from typing import Any


def from_rank_zero(engine: Any, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    from torch import distributed as dist

    values = [value]
    if engine.world_size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all_ranks(engine: Any, value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank."""
    from torch import distributed as dist

    values: list[Any] = [None] * engine.world_size
    if engine.world_size == 1:
        return [value]
    dist.all_gather_object(values, value)
    return values
