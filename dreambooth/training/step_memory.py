"""Find the memory of a training step beyond the weights by running one on fake tensors.

Fake tensors have shapes, dtypes and the kernels of a device, so they live and die as in a real step, for a base model
of any size, within seconds.
"""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dreambooth.training.empty_step import EmptyStep


def step_memory(
    directory: Path,
    *,
    resolution: int,
    images: int,
    text_encoders: Sequence[str],
    checkpointing: bool,
    autocast: bool,
    keep_gradients: bool,
) -> int:
    """Peak bytes of the forward and backward pass of `images` images, without the weights.

    They include the gradients of the weights, unless those are released at once as by ZeRO 2 and 3. With `autocast`
    matrix products are in bf16, and so are its cached copies of weights.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = EmptyStep(
            directory,
            resolution=resolution,
            images=images,
            text_encoders=text_encoders,
            checkpointing=checkpointing,
            device="cpu",
        )
        if not keep_gradients:
            for parameter in (parameter for module in step.trained for parameter in module.parameters()):
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_give_away)
        with _Alive() as alive:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model_pred = step.model_pred()
            model_pred.float().square().mean().backward()
    most: int = alive.most
    return most


def _give_away(parameter: Tensor) -> None:
    parameter.grad = None


class _Alive(TorchDispatchMode):
    """Counts the bytes of live tensors made by operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._now = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count its results."""
        before = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in before and id(storage) not in self._counted:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._counted.add(key)
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self._now -= size


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, tree)
    return found
