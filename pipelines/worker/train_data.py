"""Training data of one subject as latents; class latents are kept for the next subject that shares them."""

from typing import TYPE_CHECKING

from dreambooth.models.base_model import BaseModel
from pipelines.storage.publications import opened
from pipelines.tasks import PriorSet

if TYPE_CHECKING:
    from PIL.Image import Image

    from dreambooth.data.batches import TrainingData
    from dreambooth.data.frozen_text import FrozenTextEncoders
    from dreambooth.data.latents import LatentCache
    from pipelines.tasks import TrainTask


class ClassLatents:
    """The class latents of the last subject: subjects of a class mostly follow each other."""

    def __init__(self) -> None:
        self._of: tuple[str, PriorSet | None] | None = None
        self._latents: LatentCache | None = None

    def get(self, of: tuple[str, PriorSet | None]) -> "LatentCache | None":
        """The latents of a base model and a set (its hash, the set) if they were the last ones."""
        return self._latents if self._of == of else None

    def keep(self, of: tuple[str, PriorSet | None], latents: "LatentCache | None") -> None:
        """Keep these instead of the last ones."""
        self._of, self._latents = of, latents


def train_data(
    base: BaseModel,
    task: "TrainTask",
    class_latents: ClassLatents,
    text_encoders: "FrozenTextEncoders | None" = None,
    *,
    device: str,
) -> "TrainingData":
    """Read and encode images and prompts of a task; class images whose latents are known are not read."""
    from dreambooth.data.prepare import prepare_data

    of = base.hash, task.prior_set
    known = class_latents.get(of)
    data = prepare_data(
        base.directory,
        task.config,
        task.images,
        _class_images(task.prior_set) if known is None else known,
        text_encoders=text_encoders,
        device=device,
    )
    class_latents.keep(of, None if data.class_ is None else data.class_.latents)
    return data


def _class_images(prior_set: PriorSet | None) -> "list[Image]":
    from PIL import Image

    from dreambooth.sampling.class_images import image_name

    if prior_set is None:
        return []
    class_images = []
    with opened(prior_set.uri) as directory:
        for index in range(prior_set.count):
            with Image.open(directory / image_name(index)) as image:
                class_images.append(image.convert("RGB"))
    return class_images
