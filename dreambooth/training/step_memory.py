"""Find the memory of a training step beyond the weights by running one on fake tensors.

Fake tensors have shapes, dtypes and the kernels of a device, so they live and die as in a real step, for a base model
of any size, within seconds.
"""

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dreambooth.training.empty_step import EmptyStep


class StepMemory(NamedTuple):
    """Peak bytes of a step with gradients released at once, as by ZeRO 2 and 3, or kept to its end."""

    released: int
    kept: int


def step_memory(
    directory: Path,
    *,
    size: tuple[int, int],
    images: int,
    text_encoders: Sequence[str],
    checkpointing: bool,
    autocast: bool,
    bf16_weights: bool = False,
    update_bytes: int = 0,
) -> StepMemory:
    """Peaks of the forward and backward pass of `images` images of a height and width in pixels, without the weights.

    With `autocast` matrix products are in bf16, and so are its cached copies of weights; with `bf16_weights` there are
    none, and gradients are bf16. `update_bytes` are those that
    the update of a parameter takes for each of its values, where it is updated before its gradient is released.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = EmptyStep(
            directory,
            size=size,
            images=images,
            text_encoders=text_encoders,
            checkpointing=checkpointing,
            device="cpu",
        )
        if bf16_weights:
            step.round_weights()
        with LiveBytes(update_bytes) as alive:
            for parameter in (parameter for module in step.trained for parameter in module.parameters()):
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(alive.give_away)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model_pred = step.model_pred()
            model_pred.float().square().mean().backward()
    return StepMemory(released=alive.most, kept=alive.most_kept)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors made by operations, with the gradients that were given away and without."""

    def __init__(self, update_bytes: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._update_bytes = update_bytes
        self.most = self.most_kept = 0
        self._now = self._given_away = 0
        self._counted: set[int] = set()

    def give_away(self, parameter: Tensor) -> None:
        """Release a gradient, but remember its size."""
        assert parameter.grad is not None
        self.most = max(self.most, self._now + self._update_bytes * parameter.numel())
        self._given_away += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None

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
        self.most_kept = max(self.most_kept, self._now + self._given_away)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self._now -= size


def _tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments, in a fraction of the time of torch's own trees, which a large model notices."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for each in tree:
            yield from _tensors(each)
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))
