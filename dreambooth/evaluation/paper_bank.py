"""The paper's bank: DINO ViT-S/16, CLIP ViT-B/32 and LPIPS on AlexNet (paper, sections 4.1 and 4.3)."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from PIL import Image
from torch import Tensor

from dreambooth.errors import InputError
from dreambooth.evaluation.bank import BankLocations, ImageEmbeddings
from dreambooth.evaluation.clip import CLIPEncoder
from dreambooth.evaluation.encoder_files import find_encoder_directory
from dreambooth.evaluation.encoders import ViTEncoder
from dreambooth.evaluation.fingerprint import fingerprint
from dreambooth.evaluation.lpips import find_lpips, load_lpips
from dreambooth.evaluation.patches import MaskedPhotograph


class PaperBank:
    """DINO, CLIP-I, CLIP-T and LPIPS with the paper's encoders."""

    name = "paper"

    def __init__(self, locations: BankLocations, *, device: str) -> None:
        """Find all weights first, so that one error names everything missing; then load."""
        self._directories = find_paper_weights(locations)
        dino, clip, lpips = self._directories
        self._dino = ViTEncoder(dino, device=device)
        self._clip = CLIPEncoder(clip, device=device)
        self._lpips = load_lpips(lpips, device=device)

    @cached_property
    def hash(self) -> str:
        """See `dreambooth.evaluation.banks.Bank`."""
        dino, clip, lpips = self._directories
        encoders = ((dino, self._dino.transform), (clip, self._clip.transform), (lpips, None))
        return fingerprint(*encoders, definition="class token; LPIPS 0.1")

    def embed_images(self, images: Sequence[Image.Image]) -> ImageEmbeddings:
        """See `dreambooth.evaluation.banks.Bank`."""
        return ImageEmbeddings(dino=self._dino.encode(images), clip=self._clip.encode(images))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """See `dreambooth.evaluation.banks.Bank`."""
        return self._clip.encode_texts(texts)

    def perceptual_distances(self, images: Sequence[Image.Image]) -> Tensor:
        """LPIPS; see `dreambooth.evaluation.banks.Bank`."""
        return self._lpips.distances(images)

    def subject_similarities(self, images: Sequence[Image.Image], photographs: Sequence[MaskedPhotograph]) -> Tensor:
        """See `dreambooth.evaluation.banks.Bank`."""
        return self._dino.subject_similarities(images, photographs)


def find_paper_weights(locations: BankLocations) -> tuple[Path, Path, Path]:
    """The folders of DINO, CLIP and LPIPS, fetched if necessary. Raises one InputError for all that are missing."""
    searches: list[Callable[[], Path]] = [
        lambda: find_encoder_directory(locations.dino, what="DINO ViT-S/16", model_type="vit"),
        lambda: find_encoder_directory(locations.clip, what="CLIP ViT-B/32", model_type="clip"),
        lambda: find_lpips(locations.lpips),
    ]
    found, missing = [], []
    for search in searches:
        try:
            found.append(search())
        except InputError as error:
            missing.append(str(error))
    if missing:
        raise InputError(
            "the bank 'paper' lacks weights:\n" + "\n".join(f"- {reason}" for reason in missing) + "\n"
            "The miniature's own samples are measured with the bank 'miniature', which needs nothing."
        )
    dino, clip, lpips = found
    return dino, clip, lpips
