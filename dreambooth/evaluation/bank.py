"""Banks: the encoders that measure all figures of an evaluation, behind one protocol.

`paper` has the paper's encoders: DINO ViT-S/16, CLIP ViT-B/32, LPIPS on AlexNet. `miniature` is the ViT and the
CLIP that come with the miniature, which know its world and no other. Figures of two banks mean different things, so
every figure carries its bank's name and hash, and `dreambooth.evaluation.figures` refuses to put two in one column.

`encoder` is a ViT alone, for runs that are measured without the paper's encoders: it sees pictures, but reads no texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from dreambooth.errors import InputError

if TYPE_CHECKING:  # a plan chooses a bank, and checks of many subjects run in processes that need no PyTorch
    from torch import Tensor

    from dreambooth.evaluation.patches import MaskedPhotograph

BANKS = ("paper", "miniature")
ENCODER = "encoder"
"""The bank of a ViT alone."""


@dataclass(frozen=True, kw_only=True)
class BankLocations:
    """Locations of the paper's encoders: folders, fsspec addresses or hub ids.

    lpips holds AlexNet's weights and LPIPS's linear weights. The hub has none: None is `lpips` in the cache
    (`dreambooth.models.download.cache_directory`).
    """

    dino: str = "facebook/dino-vits16"
    clip: str = "openai/clip-vit-base-patch32"
    lpips: str | None = None


@dataclass(frozen=True, kw_only=True)
class ImageEmbeddings:
    """Embeddings of the same N images by both encoders, of unit norm, float32, on the CPU.

    `clip` is None of a bank without CLIP; `further` are those of encoders beside the bank's
    (`dreambooth.evaluation.further`), by name.
    """

    dino: "Tensor"  # (N, D1)
    clip: "Tensor | None" = None  # (N, D2)
    further: "Mapping[str, Tensor]" = field(default_factory=dict)  # (N, D) each

    def __post_init__(self) -> None:
        """Refuse embeddings of different numbers of images."""
        clip = self.dino if self.clip is None else self.clip
        if self.dino.ndim != 2 or clip.ndim != 2 or len(self.dino) != len(clip):
            raise ValueError(
                f"expected embeddings (N, D1) and (N, D2) of the same N images, "
                f"got {tuple(self.dino.shape)} and {tuple(clip.shape)}"
            )
        for name, embeddings in self.further.items():
            if embeddings.ndim != 2 or len(embeddings) != len(self.dino):
                raise ValueError(f"expected {len(self.dino)} embeddings by {name}, got {tuple(embeddings.shape)}")

    @property
    def scene(self) -> "Tensor":
        """Embeddings (N, D) that see where the subject is: CLIP's, if any, which aren't trained to see past that."""
        return self.dino if self.clip is None else self.clip

    def __len__(self) -> int:
        """Number of images."""
        return len(self.dino)

    def __getitem__(self, chosen: slice) -> "ImageEmbeddings":
        """Embeddings of some of the images: `embeddings[:4]`."""
        further = {name: embeddings[chosen] for name, embeddings in self.further.items()}
        clip = None if self.clip is None else self.clip[chosen]
        return ImageEmbeddings(dino=self.dino[chosen], clip=clip, further=further)


class Bank(Protocol):
    """The encoders of an evaluation. No figure depends on how it batches."""

    @property
    def name(self) -> str:
        """One of BANKS, or ENCODER."""

    @property
    def hash(self) -> str:
        """16 hex digits of the sha256 over weights and transforms: banks with the same hash measure the same."""

    def embed_images(self, images: Sequence[Image.Image]) -> ImageEmbeddings:
        """Embeddings of N images of any size; InputError for no images."""

    def embed_texts(self, texts: Sequence[str]) -> "Tensor":
        """CLIP's embeddings of M texts: (M, D2), of unit norm, float32, on the CPU.

        Raises InputError for no texts, for one that is longer than CLIP reads, and without a CLIP.
        """

    def perceptual_distances(self, images: Sequence[Image.Image]) -> "Tensor":
        """Distances between N images of one size: (N, N), symmetric, zero on the diagonal, float32, on the CPU.

        Raises InputError for no images and for images of more than one size.
        """

    def subject_similarities(
        self, images: Sequence[Image.Image], photographs: "Sequence[MaskedPhotograph]"
    ) -> "Tensor":
        """Masked patch similarity of N images to M photographs by DINO's patches: (N, M), float32, on the CPU.

        Photographs without a patch that is more than half the subject's are left out.
        """


def check_one_size(images: Sequence[Image.Image]) -> None:
    """Raise InputError unless there are images and all have one size: distances compare them place by place."""
    if not images:
        raise InputError("expected at least one image to measure distances between, got none")
    for position, image in enumerate(images):
        if image.size != images[0].size:
            raise InputError(
                f"perceptual distances need images of one size, but image {position} is {image.width} x {image.height} "
                f"pixels and image 0 {images[0].width} x {images[0].height}; sample or crop them alike"
            )
