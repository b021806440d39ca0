"""Load parameters into a module: some have several names, as T5's embedding table has, and some are no parameters."""

from collections.abc import Mapping

from torch import Tensor, nn


def load_parameters(module: nn.Module, weights: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """`load_state_dict` of weights by the names of `named_parameters`, which has one of each parameter's names.

    With `assign` the module takes these tensors themselves, else buffers stay as they are. Raises RuntimeError for
    missing or unknown names.
    """
    first: dict[int, str] = {}
    buffers = {} if assign else dict(module.named_buffers())
    everywhere = {name: kept for name, kept in module.state_dict().items() if name in buffers} | dict(weights)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known in weights:
            everywhere.setdefault(name, weights[known])
    module.load_state_dict(everywhere, assign=assign)
