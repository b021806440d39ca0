"""Files of weights, read without running what is in them."""

from pathlib import Path
from typing import Any

import torch

from dreambooth.errors import InputError


def read_weights(path: Path, *, cure: str) -> dict[str, Any]:
    """Tensors by name of a .safetensors file, or of one that PyTorch reads with `weights_only`.

    Raises InputError, ending with the `cure`, for a file that is damaged or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - zip, pickle and safetensors have exceptions of their own
        raise InputError(f"{path} is damaged or no file of weights ({type(error).__name__}); fetch it again") from None
    if not isinstance(weights, dict):
        raise InputError(f"{path} holds {type(weights).__name__}, not a state dict; {cure}")
    return weights
