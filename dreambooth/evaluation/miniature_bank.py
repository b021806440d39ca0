"""The miniature's bank: the ViT and the CLIP shipped with it. Its figures hold for the miniature's world only."""

from collections.abc import Sequence
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from dreambooth.evaluation.bank import ImageEmbeddings, check_one_size
from dreambooth.evaluation.clip import CLIPEncoder
from dreambooth.evaluation.encoders import ViTEncoder
from dreambooth.evaluation.fingerprint import fingerprint
from dreambooth.miniature import CLIP_DIR, VIT_DIR


class MiniatureBank:
    """Fidelity by the ViT, prompts by the CLIP, distances by the ViT's patches."""

    name = "miniature"

    def __init__(self, *, device: str) -> None:
        """Load both encoders."""
        self._vit = ViTEncoder(VIT_DIR, device=device)
        self._clip = CLIPEncoder(CLIP_DIR, device=device)

    @cached_property
    def hash(self) -> str:
        """See `dreambooth.evaluation.banks.Bank`."""
        return fingerprint((VIT_DIR, self._vit.transform), (CLIP_DIR, self._clip.transform), definition="patches 1")

    def embed_images(self, images: Sequence[Image.Image]) -> ImageEmbeddings:
        """See `dreambooth.evaluation.banks.Bank`."""
        return ImageEmbeddings(dino=self._vit.encode(images), clip=self._clip.encode(images))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """See `dreambooth.evaluation.banks.Bank`."""
        return self._clip.encode_texts(texts)

    def perceptual_distances(self, images: Sequence[Image.Image]) -> Tensor:
        """Mean of 1 - cosine similarity over the ViT's patches, place by place, and its layers: 0 (the same) to 2.

        LPIPS's form (unit-normalized features, compared place by place, averaged over layers) without its trained
        weights.
        """
        check_one_size(images)
        features = self._vit.patch_features(images)  # (N, layers, patches, D), each of unit norm
        count, layers, patches, _ = features.shape
        flat = features.flatten(1)
        distances = 1 - (flat @ flat.T) / (layers * patches)
        return torch.where(torch.eye(count, dtype=torch.bool), 0, distances.clamp(min=0))
