"""The miniature's bank: the ViT and the CLIP shipped with it. Its figures hold for the miniature's world only."""

from collections.abc import Sequence
from functools import cached_property

from PIL import Image
from torch import Tensor

from dreambooth.evaluation.bank import ImageEmbeddings, check_one_size
from dreambooth.evaluation.clip import CLIPEncoder
from dreambooth.evaluation.encoders import ViTEncoder
from dreambooth.evaluation.fingerprint import fingerprint
from dreambooth.evaluation.patches import MaskedPhotograph
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
        """See `dreambooth.evaluation.banks.Bank`; of the ViT's patches."""
        check_one_size(images)
        return self._vit.perceptual_distances(images)

    def subject_similarities(self, images: Sequence[Image.Image], photographs: Sequence[MaskedPhotograph]) -> Tensor:
        """See `dreambooth.evaluation.banks.Bank`."""
        return self._vit.subject_similarities(images, photographs)
