"""A lane's ranks sample a list of calls together: each has a pipeline, rank 0 has the list."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dreambooth.config.bounds import Graph
from pipelines.cluster.collectives import from_all_ranks, from_rank_zero
from pipelines.cluster.preemption import terminated
from pipelines.tasks import Call, Source
from pipelines.worker.hooks import Terminated
from pipelines.worker.samplers import ImageSampler


class SharedSamplers:
    """Collective: create one on every rank and call the same methods, except `run`, for rank 0 within `sharing`."""

    def __init__(self, rank: int, world_size: int, *, use_gpu: bool, num_threads: int, graph: Graph) -> None:
        """See `ImageSampler`."""
        self.rank, self.world_size = rank, world_size
        self.sampler = ImageSampler(use_gpu=use_gpu, num_threads=num_threads, graph=graph)
        self._device = "cuda" if use_gpu else "cpu"

    def give_weights(self, source: Source, base: Source, state: Mapping[str, Any]) -> None:
        """Make `source` the base's pipeline with rank 0's weights, on every rank."""
        self.sampler.give_weights(source, base, self._shared(state))

    def sharing(self, work: Callable[[], None]) -> None:
        """Run `work` on rank 0, while other ranks take a share of its calls."""
        if self.rank == 0:
            try:
                work()
            finally:
                from_rank_zero(self, None)
            return
        while (calls := from_rank_zero(self, None)) is not None:
            from_all_ranks(self, self._answer(calls))

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Results of the calls, in order; exceptions of other ranks are raised here.

        Raises Terminated instead of the next call of a rank that got SIGTERM.
        """
        for start in range(0, len(calls), self.world_size):
            some = from_rank_zero(self, calls[start : start + self.world_size])
            answers = from_all_ranks(self, self._answer(some))
            for place, (value, error) in enumerate(answers[: len(some)], start):
                if error is not None:
                    raise error
                yield place, value

    def _answer(self, calls: Sequence[Call]) -> tuple[Any, Exception | None]:
        if self.rank >= len(calls):
            return None, None
        if terminated():
            return None, Terminated(f"rank {self.rank} was terminated while it sampled")
        call = calls[self.rank]
        try:
            return getattr(self.sampler, call.method)(*call.arguments), None
        except Exception as error:  # noqa: BLE001 - raised on rank 0; other ranks continue
            return None, error

    def _shared(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Rank 0's tensors on every rank."""
        if self.world_size == 1:
            return dict(state)
        import torch
        from torch import distributed as dist

        described = from_rank_zero(self, [(name, tensor.shape, tensor.dtype) for name, tensor in state.items()])
        shared = {}
        for name, shape, dtype in described:
            tensor = state[name] if self.rank == 0 else torch.empty(shape, dtype=dtype)
            tensor = tensor.to(self._device).contiguous()
            dist.broadcast(tensor, src=0)
            shared[name] = tensor.cpu()
        return shared
