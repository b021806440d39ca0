"""Settings and plain pipelines of FLUX.1 and PixArt-Sigma."""

from pathlib import Path
from typing import Any

import torch

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.models.families import family_of

PROMPTS = ["a photo of dog", "a cat on the beach"]
SIDE, STEPS = 64, 4


def config_of(base: Path, **train: Any) -> DreamBoothConfig:
    subject = {"name": "rex", "class_noun": "dog", "identifier": "xwz", "instance_images": "photos"}
    return load_config(
        {"base_model": str(base), "subject": subject, "images": {"resolution": SIDE}, "train": {"seed": 3} | train}
    )


def plain_pipeline(directory: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_arguments(pipeline: Any) -> dict[str, Any]:
    """So that a plain pipeline takes a size that isn't in its list, and prompts as they are."""
    if type(pipeline).__name__ == "PixArtSigmaPipeline":
        return {"use_resolution_binning": False, "clean_caption": False}
    return {}


def t5(base: Path) -> set[str]:
    return {part.folder for part in family_of(base).role("text_encoder") if part.kind == "T5EncoderModel"}
