"""Settings and data of runs of DeepFloyd IF's stages, and models as if trained."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.batches import TrainingData
from dreambooth.data.images import InstanceImage
from dreambooth.data.prepare import prepare_data
from dreambooth.models.families import family_of
from dreambooth.training.model import DreamBoothModel, load_model

SIDES = {"deepfloyd-if-1": 16, "deepfloyd-if-2": 64}
PROMPTS = [" A photo of SKS dog ", "a cat on the beach"]


def configured(base: Path, photos: Path, **train: Any) -> DreamBoothConfig:
    subject = {"name": "rex", "class_noun": "Dog", "identifier": "sks", "instance_images": str(photos)}
    settings = {"mixed_precision": "no", "max_train_steps": 2, "micro_batch_size": 2} | train
    return load_config({"base_model": str(base), "subject": subject, "train": settings})


def prepared(base: Path, config: DreamBoothConfig, photos: Path) -> TrainingData:
    images = [InstanceImage(address=str(path)) for path in sorted(photos.iterdir())]
    side = 64 if family_of(base).pipeline_class == "IFSuperResolutionPipeline" else 16
    class_images = [Image.open(path).resize((side, side)) for path in sorted(photos.iterdir())]
    return prepare_data(base, config, images, class_images)


def further(stage: str, count: int) -> dict[str, Any]:
    """Arguments of a call besides the prompt: the small pictures of stage II."""
    if stage == "deepfloyd-if-1":
        return {}
    rng = np.random.default_rng(1)
    return {"image": [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]}


def moved(base: Path, config: DreamBoothConfig) -> tuple[DreamBoothModel, dict[str, Tensor]]:
    """A model and its exported state, every value moved a little."""
    model, rng = load_model(base, config), torch.Generator().manual_seed(0)
    state = {
        name: parameter.detach() + 0.01 * torch.randn(parameter.shape, generator=rng)
        for name, parameter in model.named_parameters()
    }
    return model, model.exported(state)
