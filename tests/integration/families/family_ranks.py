"""One of two processes that train every family's replica with every engine; started by test_family_engines.py.

    RANK=0 WORLD_SIZE=2 ... python family_ranks.py OUTPUT BASE_MODEL...

Rank 0 writes OUTPUT/<folder of a base model>.pt: curves and exported weights by engine.
"""

import sys
from pathlib import Path

import torch
from torch import distributed as dist
from two_ranks import STAGES, Case, curve_of, engine_of

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.batches import TrainingData
from dreambooth.data.images import find_instance_images
from dreambooth.data.prepare import prepare_data
from dreambooth.quiet import quiet

STEPS = 3
BF16 = Case(stage=3, bf16=True)
"""ZeRO's stage that does most to a module."""
SIDE = 64


def configuration(base: Path, *, accumulation: int) -> DreamBoothConfig:
    """Three steps of every text encoder and the denoiser, on the photographs beside the base."""
    train = {
        "max_train_steps": STEPS,
        "gradient_accumulation_steps": accumulation,
        "text_encoders": "all",
        "learning_rate": 1e-3,
        "max_grad_norm": 0.25,
    }
    photographs = str(base.parent / "photographs")
    subject = {"name": "rex", "class_noun": "dog", "identifier": "sks", "instance_images": photographs}
    return load_config({"base_model": str(base), "subject": subject, "images": {"resolution": SIDE}, "train": train})


def training_data(base: Path, config: DreamBoothConfig) -> TrainingData:
    """The photographs, which are their own class images, too."""
    from PIL import Image

    images = find_instance_images(config.subject.instance_images)
    class_images = []
    for image in images:
        with Image.open(image.address) as opened:
            class_images.append(opened.convert("RGB").resize((SIDE, SIDE)))
    return prepare_data(base, config, images, class_images)


def _run(base: Path, output: Path) -> None:
    config = configuration(base, accumulation=1)
    data, result = training_data(base, config), {}
    for case in (*(Case(stage=stage) for stage in STAGES), BF16):
        engine = engine_of(base, config, case)
        curve = curve_of(engine, data, config)
        result[case.name] = {"curve": curve, "state": dict(engine.state_dict())}
        if case.stage is not None:
            engine.close()
    if dist.get_rank() == 0:
        torch.save(result, output / f"{base.name}.pt")


if __name__ == "__main__":
    quiet()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for each in sys.argv[2:]:
        _run(Path(each), Path(sys.argv[1]))
    dist.destroy_process_group()
