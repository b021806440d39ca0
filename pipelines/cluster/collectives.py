"""Exchange objects between the ranks of a worker group. Collective: call on every rank."""

import datetime
from functools import cache
from typing import Any


def from_rank_zero(engine: Any, value: Any, group: Any = None) -> Any:
    """Rank 0's value, on every rank."""
    from torch import distributed as dist

    values = [value]
    if engine.world_size > 1:
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def from_all_ranks(engine: Any, value: Any, group: Any = None) -> list[Any]:
    """Every rank's value, by rank, on every rank."""
    from torch import distributed as dist

    values: list[Any] = [None] * engine.world_size
    if engine.world_size == 1:
        return [value]
    dist.all_gather_object(values, value, group=group)
    return values


def group_behind(engine: Any) -> Any:
    """The group in which threads of all ranks exchange objects while training uses its own; None for one rank."""
    from torch import distributed as dist

    return None if engine.world_size == 1 else _group_beside(dist.group.WORLD)


@cache
def _group_beside(world: Any) -> Any:
    from torch import distributed as dist

    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))  # of the slowest upload
