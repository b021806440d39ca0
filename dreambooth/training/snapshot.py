"""Snapshots of an engine: copies of its checkpoint files in host memory, made while the next gradients are computed.

Between two updates an engine's weights, moments and averages stay as they are, however long forward and backward take.
So a thread copies them meanwhile, and the engine waits for it before it changes any.

There is memory for one, not for two in turns: a snapshot is as large as the engine's state, and the next one begins
when the one before is whole in its store.
"""

import copy
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dreambooth.training.checkpoint_files import CheckpointFile
from dreambooth.training.host_pieces import Carving, HostPieces


class Snapshot:
    """Checkpoint files as they are now. `make` copies them; until it has, their tensors must not change."""

    def __init__(self, files: Sequence[CheckpointFile], memory: "HostMemory", check: Callable[[], None]) -> None:
        # Dicts and lists are copied at once: some are the optimizer's own.
        self._files = [replace(one, content=_mapped(one.content, lambda tensor: tensor)) for one in files]
        self._memory, self._check = memory, check
        self._made = threading.Event()

    def make(self) -> list[CheckpointFile]:
        """Check and copy, in any thread; the copies hold until the next snapshot. Raises what the check raises."""
        try:
            return self._memory.copies(self._files, self._check)
        finally:
            self._files = []
            self._made.set()

    def wait(self) -> None:
        """Wait until it is made."""
        self._made.wait()


class HostMemory:
    """Host memory for one snapshot, pinned for a GPU, and used again by the next.

    It is kept since a system hands out memory more slowly than memory is copied.
    """

    def __init__(self, device: str) -> None:
        self._device, self._cuda = device, device.startswith("cuda")
        self._pieces = HostPieces(pinned=self._cuda)
        self._ready: torch.cuda.Event | None = None
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that it has."""
        return self._pieces.nbytes

    def reserve(self, files: Sequence[CheckpointFile]) -> None:
        """Allocate and touch what copies of files like these need."""
        with self._lock:
            copying = _Copying(self._pieces, lambda target, source: target.zero_())
            for one in files:
                _mapped(one.content, copying.copy)

    def begin(self) -> None:
        """Note the point of the device's work that copies come after."""
        if self._cuda:
            self._ready = torch.cuda.current_stream(self._device).record_event()

    def copies(self, files: Sequence[CheckpointFile], check: Callable[[], None]) -> list[CheckpointFile]:
        """Copies of files that pass a check; those of the last call are overwritten."""
        with self._lock, torch.no_grad():
            stream = torch.cuda.Stream(self._device) if self._cuda else None
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                if stream is not None and self._ready is not None:
                    stream.wait_event(self._ready)
                check()
                copying = _Copying(self._pieces, lambda target, source: target.copy_(source, non_blocking=self._cuda))
                copied = [replace(one, content=_mapped(one.content, copying.copy)) for one in files]
            if stream is not None:
                stream.synchronize()
        return copied


class _Copying:
    """One pass over all tensors of a snapshot: `fill` puts each into its place in host memory."""

    def __init__(self, memory: HostPieces, fill: Callable[[Tensor, Tensor], object]) -> None:
        self._carving, self._fill = Carving(memory), fill
        self._done: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, tensor: Tensor) -> Tensor:
        """A tensor's copy, the same for the same memory; of a quantized one, its parts'."""
        if hasattr(tensor, "__tensor_flatten__"):
            names, context = tensor.__tensor_flatten__()
            parts = {name: self.copy(getattr(tensor, name)) for name in names}
            whole: Tensor = type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())  # type: ignore[attr-defined]
            return whole
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() == 0 or key not in self._done:
            self._done[key] = target = self._carving.tensor(tensor)
            self._fill(target, tensor.detach())
        return self._done[key]


class Snapshots:
    """The snapshots of one engine, one at a time. `seconds_waited` is what the engine waited for them."""

    def __init__(self, device: str) -> None:
        self._device, self._memory = device, HostMemory(device)
        self._current: Snapshot | None = None
        self._reserving: threading.Thread | None = None
        self.seconds_waited = 0.0

    def reserve(self, files: Sequence[CheckpointFile]) -> None:
        """Let a thread reserve the memory of a snapshot, so that the first doesn't wait for it."""
        self._reserving = threading.Thread(target=self._memory.reserve, args=(list(files),), daemon=True)
        self._reserving.start()

    def take(self, files: Sequence[CheckpointFile], check: Callable[[], None]) -> Snapshot:
        """A snapshot of now, for a thread to make. What the one before was copied to is overwritten."""
        self.settle()
        self._memory.begin()
        self._current = Snapshot(files, self._memory, check)
        return self._current

    def settle(self) -> None:
        """Wait until the last snapshot is made. Call before what it copies changes."""
        if self._current is not None:
            began = time.perf_counter()
            self._current.wait()
            self._current = None
            self.seconds_waited += time.perf_counter() - began

    def close(self) -> None:
        """Leave the memory to others, once no thread fills it any more."""
        self.settle()
        if self._reserving is not None:
            self._reserving.join()
        self._memory = HostMemory(self._device)


def _mapped(content: Any, of_tensor: Callable[[Tensor], Any]) -> Any:
    """Nested dicts, lists and tuples with each tensor replaced; other values are the same objects."""
    if isinstance(content, Tensor):
        return of_tensor(content)
    if isinstance(content, dict):
        copied = copy.copy(content)  # with its attributes, such as the versions of a state dict
        for name, value in content.items():
            copied[name] = _mapped(value, of_tensor)
        return copied
    if type(content) in (list, tuple):
        return type(content)(_mapped(value, of_tensor) for value in content)
    return content
