"""What a step would wait for if a device did it."""

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2")
COPIES = ("_to_copy", "copy_")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
"""Which wait for a size where an index is of bools."""
OF_HOST = ("tensor", "as_tensor", "asarray", "new_tensor")
"""Functions that make a tensor of values in pageable host memory, which a device waits for and no graph can copy."""
TO_HOST = ("tolist", "numpy", "cpu", "__array__")


class HostReads:
    """Operations that wait for a value or a size from the device, or copy between devices and the host.

    On a CPU, too, where a copy to the device is none: those are told by the function that was called.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        patch = self._modes.enter_context(pytest.MonkeyPatch.context())
        for name in ("from_numpy", "frombuffer"):  # no mode sees them
            patch.setattr(torch, name, self._seeing(name, getattr(torch, name)))
        self._modes.enter_context(_Calls(self.seen))
        self._modes.enter_context(_Operations(self.seen))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._modes.close()

    def _seeing(self, name: str, function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.seen.append(name)
            return function(*args, **kwargs)

        return called


class _Calls(TorchFunctionMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in OF_HOST + TO_HOST:
            self._seen.append(name)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
        copied = name in COPIES and len({one.device for one in tensors}) > 1
        by_bools = name in INDEXING and any(one.dtype == torch.bool for one in tree_leaves(args[1]) if one is not None)
        if name in READS or copied or by_bools:
            self._seen.append(name)
        return result
