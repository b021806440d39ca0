"""Encoders beside a bank's, each with figures, a name and a hash of its own: DINOv2 and DreamSim.

The paper has neither, so neither is part of a bank, and no figure of theirs stands in a bank's column.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor

from dreambooth.config.evaluation import FURTHER
from dreambooth.errors import InputError
from dreambooth.evaluation.patches import MaskedPhotograph


class FurtherEncoder(Protocol):
    """An encoder beside a bank's."""

    @property
    def hash(self) -> str:
        """16 hex digits of the sha256 over weights, transform and use."""

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of images: (N, D), float32, of unit norm, on the CPU; InputError for no images."""

    def subject_similarities(
        self, images: Sequence[Image.Image], photographs: Sequence[MaskedPhotograph]
    ) -> Tensor | None:
        """Similarities as a bank's; None for an encoder that has no patches of its own."""


class DINOv2:
    """DINOv2 in transformers' form; the embedding is the class token's after the last norm (arXiv 2304.07193)."""

    def __init__(self, address: str, *, device: str) -> None:
        """Find and load it."""
        from dreambooth.evaluation.encoder_files import find_encoder_directory
        from dreambooth.evaluation.encoders import ViTEncoder
        from dreambooth.evaluation.fingerprint import fingerprint

        directory = find_encoder_directory(address, what="DINOv2", model_type="dinov2")
        self._vit = ViTEncoder(directory, device=device)
        self.hash = fingerprint((directory, self._vit.transform), definition="DINOv2: class token, patches 1")

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """See `FurtherEncoder`."""
        return self._vit.encode(images)

    def subject_similarities(
        self, images: Sequence[Image.Image], photographs: Sequence[MaskedPhotograph]
    ) -> Tensor | None:
        """See `FurtherEncoder`."""
        return self._vit.subject_similarities(images, photographs)


class DreamSimEncoder:
    """DreamSim, whose cosine similarity is 1 - distance."""

    def __init__(self, address: str, *, device: str) -> None:
        """Find and load it."""
        from dreambooth.evaluation.dreamsim import DreamSim, find_dreamsim, used_files
        from dreambooth.evaluation.fingerprint import fingerprint_of_files

        directory: Path = find_dreamsim(address)
        self._model = DreamSim(directory, device=device)
        self.hash = fingerprint_of_files(directory, used_files(directory), definition="DreamSim 1")

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """See `FurtherEncoder`."""
        return self._model.encode(images)

    def subject_similarities(
        self, images: Sequence[Image.Image], photographs: Sequence[MaskedPhotograph]
    ) -> Tensor | None:
        """None: it is tuned for whole images."""
        return None


def load_further(name: str, address: str, *, device: str = "cpu") -> FurtherEncoder:
    """Load DINOv2 or DreamSim from a folder, an address that fsspec knows, or a hub id.

    Raises InputError for an unknown name, and for weights that are missing, damaged or another model's.
    """
    try:
        if name == "dinov2":
            return DINOv2(address, device=device)
        if name == "dreamsim":
            return DreamSimEncoder(address, device=device)
    except InputError as error:
        raise InputError(f"evaluation.{name}: {error}") from None
    raise InputError(f"there is no encoder {name!r}; expected {' or '.join(FURTHER)}")
