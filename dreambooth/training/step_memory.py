"""How much memory does a training step need beyond the weights? Found by going through one on tensors without data.

The fake tensors know shapes, types and the kernels that a device would choose, so what is alive when is what a real
step has, for a base model of any size, within seconds.
"""

import weakref
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
    train_text_encoder: bool,
    checkpointing: bool,
    autocast: bool,
    keep_gradients: bool,
) -> int:
    """Bytes that are alive at most during the forward and backward pass of `images` images, weights not counted.

    The gradients of the weights are among them, unless they are given away as they come, as ZeRO 2 and 3 do. With
    `autocast` matrix products are in bf16, and so are the copies of weights that it keeps for them.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = EmptyStep(
            directory,
            resolution=resolution,
            images=images,
            train_text_encoder=train_text_encoder,
            checkpointing=checkpointing,
            device="cpu",
        )
        if not keep_gradients:
            for parameter in (*step.denoiser.parameters(), *step.text_encoder.parameters()):
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
    """Counts the bytes of the tensors that operations make, as long as anybody holds them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._now = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
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
