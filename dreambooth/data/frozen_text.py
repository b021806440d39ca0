"""Text encoders that stay frozen: they encode prompts before training, then wait in main memory for the next ones."""

from pathlib import Path

import torch
from torch import nn

from dreambooth.models.families import Tensors, family_of


class FrozenTextEncoders:
    """Text encoders of the base model in `directory`, each loaded at its first use and kept.

    T5-XXL takes longer to read from disk than a prompt does to encode, and its 18 GiB are wanted by training on a GPU.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._kept: dict[str, nn.Module] = {}

    def encode(self, folder: str, tokens: Tensors, *, device: str) -> Tensors:
        """`Family.encode_with` of the text encoder in `folder`, on the CPU; it is on `device` for that time alone."""
        family = family_of(self.directory)
        if folder not in self._kept:
            self._kept[folder] = family.load(self.directory, folder).eval().requires_grad_(False)
        text_encoder = self._kept[folder].to(device)
        try:
            with torch.no_grad():
                encoded = family.encode_with(
                    folder, text_encoder, {name: one.to(device) for name, one in tokens.items()}
                )
            return {name: tensor.cpu() for name, tensor in encoded.items()}
        finally:
            text_encoder.to("cpu")
