"""Load parameters into a module some of which have several names, as T5's embedding table has."""

from collections.abc import Mapping

from torch import Tensor, nn


def load_parameters(module: nn.Module, weights: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """`load_state_dict` of weights by the names of `named_parameters`, which has one of each parameter's names.

    With `assign` the module takes these tensors themselves. Raises RuntimeError for missing or unknown names.
    """
    first: dict[int, str] = {}
    everywhere = dict(weights)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known in weights:
            everywhere.setdefault(name, weights[known])
    module.load_state_dict(everywhere, assign=assign)
