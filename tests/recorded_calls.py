"""A capture as far as a CPU can have one: a function's operations, repeated on the memory they were recorded with."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from dreambooth.fixed_tensors import WARM_UP, CaptureMemory, Replayed


class Recording(TorchDispatchMode):
    """Records operations, and repeats them without calling any Python of the function again.

    As a graph does, it reads inputs and weights where they lay, and writes results where they were written.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "this waits for the host"
        # A parameter may get other memory: a graph would not know.
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
        result = function(*args, **kwargs)
        self._operations.append((function, args, kwargs, result))
        return result

    def repeat(self) -> None:
        for function, args, kwargs, result in self._operations:
            for before, again in zip(
                *(tree_flatten(each)[0] for each in (result, function(*args, **kwargs))), strict=True
            ):
                if isinstance(before, torch.Tensor) and before.data_ptr() != again.data_ptr():
                    before.copy_(again)


class Recorded(Replayed):
    """`Replayed` that captures on a CPU. `count` is how many of them have, `memories` are those they share."""

    count = 0
    memories: ClassVar[list[CaptureMemory]] = []

    def __init__(self, function: Callable[[], None], say: Callable[[str], None], memory: CaptureMemory) -> None:
        super().__init__(function, say, memory)
        Recorded.memories.append(memory)
        self._recording: Recording | None = None

    def __call__(self) -> None:
        self._calls += 1
        if self._recording is not None:
            self._recording.repeat()
        elif self._calls <= WARM_UP:
            self._function()
        else:
            Recorded.count += 1
            self._recording = Recording()
            with self._recording:
                self._function()
