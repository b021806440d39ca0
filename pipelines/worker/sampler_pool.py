"""Several sampling actors on the cluster, working through a list of calls."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dreambooth.config.bounds import Graph
from pipelines.tasks import Call
from pipelines.worker.samplers import ImageSampler


class RunningSamplers:
    """Actors, running or starting. Only running ones get work, so a full cluster delays but never blocks."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._idle: list[Any] = []
        self._pending: dict[Any, tuple[Any, int | None]] = {actor.ready.remote(): (actor, None) for actor in actors}

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Results of the calls as they arrive, each with its index."""
        import ray

        waiting, left = deque(enumerate(calls)), len(calls)
        while left:
            while waiting and self._idle:
                index, call = waiting.popleft()
                actor = self._idle.pop(0)
                self._pending[getattr(actor, call.method).remote(*call.arguments)] = (actor, index)
            [done], _ = ray.wait(list(self._pending), num_returns=1)
            actor, place = self._pending.pop(done)
            value = ray.get(done)
            self._idle.append(actor)
            if place is not None:
                left -= 1
                yield place, value


class SamplerPool:
    """The number of sampling actors; each takes a CPU, and with `use_gpu` a GPU."""

    def __init__(self, *, actors: int, use_gpu: bool, graph: Graph = "off") -> None:
        self.actors, self.use_gpu, self.graph = actors, use_gpu, graph

    @contextmanager
    def started(self, wanted: int) -> Iterator[RunningSamplers]:
        """Start at most `wanted` actors, and end them at the end."""
        import ray

        # A call is repeated if its node is lost; its result depends on its arguments alone.
        options = {"num_cpus": 1, "num_gpus": 1 if self.use_gpu else 0}
        actor = ray.remote(ImageSampler).options(**options, max_restarts=2, max_task_retries=2)
        number = min(self.actors, wanted)
        started: list[Any] = [actor.remote(use_gpu=self.use_gpu, graph=self.graph) for _ in range(number)]
        try:
            yield RunningSamplers(started)
        finally:
            for one in started:
                ray.kill(one)
