"""Embeddings of images by a ViT from a folder or the hub.

Images are prepared with Pillow and numpy as the encoder's preprocessor_config.json says, so torchvision isn't needed.
One exception: the published file of DINO (facebook/dino-vits16) squeezes images to 224 x 224, which does not give the
DreamBooth paper's figures. DINO's own evaluation transform does: the shorter side to 256, and the middle 224 x 224 cut
out (github.com/google/dreambooth, issue 3).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreambooth.amounts import counted
from dreambooth.errors import InputError
from dreambooth.evaluation.patches import MaskedPhotograph, masked_patch_similarity, subject_patches
from dreambooth.models.building import BUILDING
from dreambooth.quiet import hide_progress_bars, quiet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGES_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Preprocessing of an image: resize, crop the centre, normalize."""

    resize: int | tuple[int, int]  # the shorter side, or (height, width) exactly
    crop: int | None
    resample: Image.Resampling = Image.Resampling.BICUBIC
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixel values of one image: (3, H, W), float32."""
        pixels = np.asarray(self.cut(image.convert("RGB")), dtype=np.float32) / 255
        normalized = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(normalized.transpose(2, 0, 1)))

    def cut(self, image: Image.Image) -> Image.Image:
        """What the encoder sees of an image, or of its mask, in the encoder's size."""
        if isinstance(self.resize, int):
            # The longer side is cut off to whole pixels, as torchvision does it.
            width, height = (self.resize * side // min(image.size) for side in image.size)
        else:
            height, width = self.resize
        if image.size != (width, height):
            image = image.resize((width, height), self.resample)
        if self.crop is None:
            return image
        left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
        return image.crop((left, top, left + self.crop, top + self.crop))


DINO_TRANSFORM = Transform(resize=256, crop=224)
"""The paper's transform, for facebook/dino-vits16."""


def read_transform(directory: Path) -> Transform:
    """The transform of a folder with a preprocessor_config.json; without one, DINO's.

    Raises InputError for a file without a size.
    """
    path = directory / "preprocessor_config.json"
    if not path.is_file():
        return DINO_TRANSFORM
    settings = json.loads(path.read_text())
    size, mean, std = settings.get("size"), tuple(settings["image_mean"]), tuple(settings["image_std"])
    crop = settings.get("crop_size") if settings.get("do_center_crop", "crop_size" in settings) else None
    if crop is None and size in (224, {"height": 224, "width": 224}) and (mean, std) == (IMAGENET_MEAN, IMAGENET_STD):
        return DINO_TRANSFORM
    kind = str(settings.get("image_processor_type", settings.get("feature_extractor_type", "")))
    if isinstance(size, int) and kind.startswith("CLIP"):  # older files; of a ViT a number alone means a square
        size = {"shortest_edge": size}
    return Transform(
        resize=_resize(size, path),
        crop=crop["height"] if isinstance(crop, dict) else crop,
        resample=Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC)),
        mean=mean,
        std=std,
    )


def _resize(size: Any, path: Path) -> int | tuple[int, int]:
    match size:
        case int():
            return size, size
        case {"shortest_edge": int(side)}:
            return side
        case {"height": int(height), "width": int(width)}:
            return height, width
    raise InputError(f"{path}: expected a size in pixels, got {size!r}")


class ViTEncoder:
    """A transformers ViTModel or Dinov2Model; the embedding is the class token's, after the last layer's norm."""

    def __init__(self, directory: Path, *, device: str) -> None:
        """Load the model and its transform. Raises InputError for damaged weights and those of another model."""
        quiet()
        hide_progress_bars()
        from transformers import Dinov2Model, ViTModel

        self.transform = read_transform(directory)
        if json.loads((directory / "config.json").read_text())["model_type"] == "dinov2":
            model = load_whole(Dinov2Model, directory)
        else:
            model = load_whole(ViTModel, directory, add_pooling_layer=False)
        self._model = model.to(device).eval()
        self._device = device

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of images: (N, D), float32, of unit norm, on the CPU; raises InputError for no images."""
        embeddings = [self._model(pixels).last_hidden_state[:, 0].float().cpu() for pixels in self._pixels(images)]
        return torch.nn.functional.normalize(torch.cat(embeddings), dim=-1)

    @torch.inference_mode()
    def patch_features(self, images: Sequence[Image.Image]) -> Tensor:
        """The patches' hidden states after every layer: (N, layers, patches, D), float32, of unit norm, on the CPU."""
        features = []
        for pixels in self._pixels(images):
            states = self._model(pixels, output_hidden_states=True).hidden_states[1:]  # without the input
            features.append(torch.stack([state[:, 1:] for state in states], dim=1).float().cpu())
        return torch.nn.functional.normalize(torch.cat(features), dim=-1)

    def subject_similarities(self, images: Sequence[Image.Image], photographs: Sequence[MaskedPhotograph]) -> Tensor:
        """Masked patch similarity of N images to M photographs, by the last layer's patches: (N, M), float32.

        Photographs without a patch that is more than half the subject's are left out, so M may be smaller.
        """
        size = self._model.config.patch_size
        inside = [subject_patches(self.transform.cut(each.mask), size) for each in photographs]
        seen = self._patches([each.picture for each in photographs])
        subjects = [patches[chosen] for patches, chosen in zip(seen, inside, strict=True) if bool(chosen.any())]
        patches = self._patches(images)
        similar = [masked_patch_similarity(patches, subject) for subject in subjects]
        return torch.stack(similar, dim=1) if similar else patches.new_zeros(len(patches), 0)

    @torch.inference_mode()
    def _patches(self, images: Sequence[Image.Image]) -> Tensor:
        """The patches after the last layer's norm: (N, patches, D), float32, of unit norm, on the CPU."""
        patches = [self._model(pixels).last_hidden_state[:, 1:].float().cpu() for pixels in self._pixels(images)]
        return torch.nn.functional.normalize(torch.cat(patches), dim=-1)

    def perceptual_distances(self, images: Sequence[Image.Image]) -> Tensor:
        """Mean of 1 - cosine similarity over patches, place by place, and layers: (N, N), 0 (the same) to 2.

        LPIPS's form (unit-normalized features, compared place by place, averaged over layers) without its trained
        weights.
        """
        features = self.patch_features(images)  # (N, layers, patches, D), each of unit norm
        count, layers, patches, _ = features.shape
        flat = features.flatten(1)
        distances = 1 - (flat @ flat.T) / (layers * patches)
        return torch.where(torch.eye(count, dtype=torch.bool), 0, distances.clamp(min=0))

    def _pixels(self, images: Sequence[Image.Image]) -> Iterator[Tensor]:
        """Pixel values, some images at a time, on the device."""
        for some in some_at_once(images):
            yield torch.stack([self.transform(image) for image in some]).to(self._device)


def some_at_once(images: Sequence[Image.Image]) -> Iterator[Sequence[Image.Image]]:
    """Images in parts of at most `IMAGES_AT_ONCE`, in order. Raises InputError for no images."""
    if not images:
        raise InputError("expected at least one image to encode, got none")
    for start in range(0, len(images), IMAGES_AT_ONCE):
        yield images[start : start + IMAGES_AT_ONCE]


def load_whole(kind: Any, directory: Path, **settings: Any) -> Any:
    """A transformers model of a folder, float32. Raises InputError unless all of its weights are there and whole."""
    try:
        with BUILDING:
            model, found = kind.from_pretrained(
                directory, local_files_only=True, dtype=torch.float32, output_loading_info=True, **settings
            )
    except Exception as error:  # noqa: BLE001 - safetensors, zip, pickle and transformers have exceptions of their own
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the weights in {directory} are damaged or don't fit its config.json ({type(error).__name__}: {reason}); "
            f"fetch them again"
        ) from None
    if lacking := sorted(found["missing_keys"]):
        raise InputError(
            f"the weights in {directory} lack {lacking[0]} and {counted(len(lacking) - 1, 'other tensor')} of a "
            f"{kind.__name__}; is the copy complete, and of this model?"
        )
    return model
