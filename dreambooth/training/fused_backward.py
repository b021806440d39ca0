"""Updates within the backward pass, so that no more than one gradient at a time is there."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class FusedBackward:
    """Updates each parameter as soon as its gradient is whole, then frees the gradient.

    The results are those of `optimizer.step()` after the pass, to the bit: no update depends on another gradient,
    which is why the norm of all can't bound them. `optimizer` keeps its groups and its state.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._norms: dict[int, Tensor] = {}
        # By number, because loading a state puts new groups in place of these.
        of_groups = [(index, each) for index, group in enumerate(optimizer.param_groups) for each in group["params"]]
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._update, number, group))
            for number, (group, parameter) in enumerate(of_groups)
        ]

    def _update(self, number: int, group: int, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self._norms[number] = torch.linalg.vector_norm(parameter.grad)
        groups = self._optimizer.param_groups
        self._optimizer.param_groups = [{**groups[group], "params": [parameter]}]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = groups
        parameter.grad = None

    def norm(self) -> Tensor:
        """Norm of all gradients of the last pass."""
        in_order = [norm for _, norm in sorted(self._norms.items())]  # as they are summed without this class
        self._norms.clear()
        total: Tensor = torch.linalg.vector_norm(torch.stack(in_order))
        return total

    def remove(self) -> None:
        """Leave parameters as they were."""
        for hook in self._hooks:
            hook.remove()
