"""Tensors that keep their addresses from subject to subject, and functions of them that are replayed as CUDA graphs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
"""Calls of a function before it is captured: libraries choose kernels and set up workspaces in the first."""


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


class Replayed:
    """A function that reads and writes tensors at fixed addresses alone, captured as a CUDA graph after a warm-up.

    The calls of the warm-up do their work like all others. Where a capture fails, and on a CPU, the function is called
    every time; `say` takes the reason once. `pool` is that of a capture to share memory with, whose replays end before
    this one's begin; None: memory of its own.
    """

    def __init__(
        self,
        function: Callable[[], None],
        device: str,
        say: Callable[[str], None],
        pool: Callable[[], Any] = lambda: None,
    ) -> None:
        self._function, self._say, self._find_pool = function, say, pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(device) if device.startswith("cuda") else None
        self._calls = 0

    @property
    def captured(self) -> bool:
        """Whether calls are replays."""
        return self._graph is not None

    @property
    def pool(self) -> Any:
        """The memory of the capture, None without one."""
        return None if self._graph is None else self._graph.pool()

    def __call__(self) -> None:
        """Do the work of one call."""
        self._calls += 1
        if self._calls == WARM_UP + 1 and self._stream is not None:
            self._capture(self._stream)
        if self._graph is not None:
            self._graph.replay()
        elif self._stream is not None:
            self._call_on(self._stream)
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
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile: they copy checkpoints and sample. A capture that fails leaves
            # its stream as the current one, which the outer context puts right.
            with (
                torch.cuda.stream(torch.cuda.current_stream(stream.device)),
                torch.cuda.graph(graph, pool=self._find_pool(), stream=stream, capture_error_mode="thread_local"),
            ):
                self._function()
        except Exception as error:  # noqa: BLE001 - whatever can't be captured still runs
            self._say(f"{type(error).__name__}: {error}")
        else:
            self._graph = graph
