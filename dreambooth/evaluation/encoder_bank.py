"""The bank of a ViT alone: fidelity and near-copies, but nothing about texts, which only a CLIP reads."""

from collections.abc import Sequence
from functools import cached_property

from PIL import Image
from torch import Tensor

from dreambooth.errors import InputError
from dreambooth.evaluation.bank import ENCODER, ImageEmbeddings, check_one_size
from dreambooth.evaluation.encoder_files import find_image_encoder
from dreambooth.evaluation.encoders import ViTEncoder
from dreambooth.evaluation.fingerprint import fingerprint
from dreambooth.evaluation.patches import MaskedPhotograph


class EncoderBank:
    """Fidelity by the ViT, distances by its patches."""

    name = ENCODER

    def __init__(self, address: str, *, device: str) -> None:
        """Load the encoder of a folder, an address or a hub id. Raises InputError if it isn't there or isn't a ViT."""
        self._directory = find_image_encoder(address)
        self._vit = ViTEncoder(self._directory, device=device)

    @cached_property
    def hash(self) -> str:
        """See `dreambooth.evaluation.banks.Bank`."""
        return fingerprint((self._directory, self._vit.transform), definition="patches 1")

    def embed_images(self, images: Sequence[Image.Image]) -> ImageEmbeddings:
        """See `dreambooth.evaluation.banks.Bank`; without CLIP's."""
        return ImageEmbeddings(dino=self._vit.encode(images))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Raise InputError: a ViT reads no texts."""
        raise InputError(f"expected a bank with a CLIP to embed {len(texts)} texts, got an image encoder alone")

    def perceptual_distances(self, images: Sequence[Image.Image]) -> Tensor:
        """See `dreambooth.evaluation.banks.Bank`; of the ViT's patches."""
        check_one_size(images)
        return self._vit.perceptual_distances(images)

    def subject_similarities(self, images: Sequence[Image.Image], photographs: Sequence[MaskedPhotograph]) -> Tensor:
        """See `dreambooth.evaluation.banks.Bank`."""
        return self._vit.subject_similarities(images, photographs)
