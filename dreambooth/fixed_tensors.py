"""Tensors that keep their addresses from subject to subject, and functions of them that are replayed as CUDA graphs."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3
"""Calls of a function before it is captured: libraries choose kernels and set up workspaces in the first."""


_FAILED: list[torch.cuda.CUDAGraph] = []
"""Captures that failed: torch's allocator may go on asking one for its stream, and never frees its pool (2.13)."""


class FixedTensors:
    """Tensors by name; the next of a name is copied into the first one's memory. `allocations` counts what was not."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.allocations = 0
        self._tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def keep(self, name: str, value: Tensor) -> Tensor:
        """The tensor of a name, with these values. Allocated anew only for another shape or dtype."""
        kept = self._tensors.get(name)
        if kept is None or (kept.shape, kept.dtype) != (value.shape, value.dtype):
            kept = self._tensors[name] = torch.empty_like(value, device=self.device)
            self.allocations += 1
        return kept.copy_(value, non_blocking=True)


class CaptureMemory:
    """What captures share whose replays follow one another: a pool of memory, and the stream that they are made on.

    torch's allocator gives a freed block to work of the same stream alone, so that in one pool captures on streams of
    their own would share nothing.
    """

    def __init__(self, device: str) -> None:
        self.stream = torch.cuda.Stream(device) if device.startswith("cuda") else None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def any_graph(self) -> torch.cuda.CUDAGraph | None:
        """One of the captures there are. Hold it while the next is made: with the last one its pool goes."""
        return next(iter(self._graphs), None)

    def add(self, graph: torch.cuda.CUDAGraph) -> None:
        """Let further captures share the memory of this one, as long as it is there."""
        self._graphs.add(graph)


class Replayed:
    """A function that reads and writes tensors at fixed addresses alone, captured as a CUDA graph after a warm-up.

    The calls of the warm-up do their work like all others. Where a capture fails, and on a CPU, the function is called
    every time; `say` takes the reason once. `memory` is that of captures whose replays end before this one's begin.
    """

    def __init__(self, function: Callable[[], None], say: Callable[[str], None], memory: CaptureMemory) -> None:
        self._function, self._say, self._memory = function, say, memory
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    @property
    def captured(self) -> bool:
        """Whether calls are replays."""
        return self._graph is not None

    def __call__(self) -> None:
        """Do the work of one call."""
        self._calls += 1
        stream = self._memory.stream
        if self._calls == WARM_UP + 1 and stream is not None:
            self._capture(stream)
        if self._graph is not None:
            self._graph.replay()
        elif stream is not None:
            self._call_on(stream)
        else:
            self._function()

    def _call_on(self, stream: torch.cuda.Stream) -> None:
        """Call on a stream that the current one waits for: what the first calls allocate belongs to it."""
        current = torch.cuda.current_stream(stream.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._function()
        current.wait_stream(stream)

    def _capture(self, stream: torch.cuda.Stream) -> None:
        graph, other = torch.cuda.CUDAGraph(), self._memory.any_graph()
        pool = None if other is None else other.pool()
        try:
            # Other threads may use the device meanwhile: they copy checkpoints and sample. A capture that fails leaves
            # its stream as the current one, which the outer context puts right.
            with (
                torch.cuda.stream(torch.cuda.current_stream(stream.device)),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                self._function()
        except Exception as error:  # noqa: BLE001 - whatever can't be captured still runs
            _FAILED.append(graph)
            first = _first(error)
            reserved = torch.cuda.memory_reserved(stream.device) / 2**30
            self._say(
                f"{type(first).__name__}: {first} (PyTorch has {reserved:.2f} GiB reserved, with what it captured)"
            )
        else:
            self._graph = graph
            self._memory.add(graph)


def _first(error: BaseException) -> BaseException:
    """What went wrong first: ending a capture that failed is a further error."""
    while error.__context__ is not None:
        error = error.__context__
    return error
