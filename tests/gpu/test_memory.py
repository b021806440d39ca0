"""What the plan says of a GPU's memory, against what training takes there."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from full_size import configuration, random_batch, random_model

from dreambooth.base_model import BaseModel
from dreambooth.config import ZeroConfig, load_config
from dreambooth.engine import TorchEngine
from dreambooth.families import family_of
from dreambooth.miniature import subject_dir
from pipelines.cluster import Resources
from pipelines.deepspeed_engine import DeepSpeedEngine
from pipelines.memory import peak_bytes
from pipelines.plan import Plan, make_plan

pytestmark = pytest.mark.filterwarnings("default")  # DeepSpeed uses what PyTorch deprecates

WITHIN, STEPS = 0.15, 3


def planned(base: Path, resolution: int, *overrides: str) -> int:
    photographs = str(subject_dir("coral-car"))
    subject = {"name": "rex", "class_noun": "car", "identifier": "tfz", "instance_images": photographs}
    small: Plan = make_plan(load_config({"subject": subject}, overrides), Resources(cpus=8, gpus=1))
    config = small.config.model_copy(
        update={"images": small.config.images.model_copy(update={"resolution": resolution})}
    )
    model = BaseModel(address=str(base), revision=None, directory=base)
    parts = zip(("unet", "text_encoder"), family_of(base).empty_components(base), strict=True)
    # Else read from the weights, of which there are none.
    vars(model)["parameter_counts"] = {name: sum(p.numel() for p in part.parameters()) for name, part in parts}
    return peak_bytes(replace(small, config=config, base=model))


def measured(base: Path, resolution: int, stage: int | None, *overrides: str) -> int:
    """By how much the device's memory grows at most in three steps."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    config = configuration(base, *overrides)
    model = random_model(base, config, device="cuda", autocast=True)
    engine: Any = (
        TorchEngine(model, config.train, "cuda")
        if stage is None
        else DeepSpeedEngine(model, config.train, ZeroConfig(stage=stage), "cuda")
    )
    try:
        for _ in range(STEPS):
            engine.backward(engine(random_batch(base, pairs=1, resolution=resolution)).total)
            engine.step()
        return torch.cuda.max_memory_allocated() - before
    finally:
        engine.close()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all-activations", "checkpointing"])
@pytest.mark.parametrize("stage", [None, 2], ids=["torch", "zero2"])
def test_full_size(full_size: Path, stage: int | None, checkpointing: bool) -> None:
    """As large as Stable Diffusion 1.5, at 512 pixels, with matrix products in bf16."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    overrides = [
        f"engine={'torch' if stage is None else 'deepspeed'}",
        f"zero.stage={stage or 0}",
        "train.mixed_precision=bf16",
        "train.micro_batch_size=1",
        f"train.gradient_checkpointing={str(checkpointing).lower()}",
    ]
    expected, got = planned(full_size, 512, *overrides), measured(full_size, 512, stage, *overrides)
    print(f"planned {expected / 2**30:.2f} GiB, measured {got / 2**30:.2f} GiB")
    assert got == pytest.approx(expected, rel=WITHIN)
