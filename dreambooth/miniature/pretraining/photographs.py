"""Crops of real photographs, so that the autoencoder and the ViT know more than drawings.

The folder holds one folder of JPEGs per subject. The subjects in HELD_OUT are never trained on: quality.py measures
with them.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HELD_OUT = ("candle", "dog2", "rc_car", "shiny_sneaker")


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """Photographs by subject, each kept with its shorter side at 256 px."""

    by_subject: dict[str, tuple[Image.Image, ...]]

    def crop(
        self, rng: random.Random, subject: str | None = None, *, smallest: float = 0.25, size: int = 64
    ) -> Image.Image:
        """A square crop of a photograph (of `subject`, or of any), mirrored half of the time.

        Its side is `smallest` to 1 of the photograph's shorter side, its size in pixels `size`.
        """
        photograph = rng.choice(self.by_subject[subject or rng.choice(tuple(self.by_subject))])
        side = int(min(photograph.size) * rng.uniform(smallest, 1))
        left, top = rng.randint(0, photograph.width - side), rng.randint(0, photograph.height - side)
        crop = photograph.resize(
            (size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side), reducing_gap=2
        )
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop

    def centre_crops(self, size: int = 64) -> list[Image.Image]:
        """The middle square of every photograph, size x size."""
        crops = []
        for photographs in self.by_subject.values():
            for photograph in photographs:
                side = min(photograph.size)
                left, top = (photograph.width - side) // 2, (photograph.height - side) // 2
                crops.append(
                    photograph.resize(
                        (size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side), reducing_gap=3
                    )
                )
        return crops


def load_photographs(folder: Path, *, held_out: bool = False) -> Photographs:
    """Read the training subjects (or, with `held_out`, the held-out ones) below `folder`.

    Raises:
        FileNotFoundError: if there is no photograph to read.
    """
    by_subject = {}
    for subject in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (subject.name in HELD_OUT) != held_out:
            continue
        photographs = []
        for path in sorted(subject.glob("*.jpg")):
            photograph = Image.open(path).convert("RGB")
            scale = 256 / min(photograph.size)
            photographs.append(photograph.resize((round(photograph.width * scale), round(photograph.height * scale))))
        if photographs:
            by_subject[subject.name] = tuple(photographs)
    if not by_subject:
        raise FileNotFoundError(f"{folder} holds no folders of .jpg photographs; see --photographs")
    return Photographs(by_subject=by_subject)


def to_pixels(images: list[Image.Image]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """RGB images of one size as (B, 3, H, W) float32 from -1 to 1."""
    stacked = np.stack([np.asarray(image) for image in images])  # (B, H, W, 3)
    return np.ascontiguousarray(stacked.transpose(0, 3, 1, 2), dtype=np.float32) / 127.5 - 1
