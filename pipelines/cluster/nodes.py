"""The nodes of a running cluster."""

import time
from typing import Any

_OVERDUE_SECONDS = 10.0
"""Ray Train takes some seconds from a preempted node's deadline to the end of its workers."""


def alive_nodes() -> list[dict[str, Any]]:
    """What Ray knows of each node that is alive: its NodeID, Resources, NodeManagerHostname and more."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def nodes_there() -> frozenset[str]:
    """Ids of the nodes that are alive, but for preempted ones after their deadline: workers there have ended."""
    from ray._private.state import state

    before = 1000 * (time.time() - _OVERDUE_SECONDS)
    overdue = {node for node, deadline in state.get_draining_nodes().items() if 0 < deadline < before}
    return frozenset(node["NodeID"] for node in alive_nodes()) - overdue
