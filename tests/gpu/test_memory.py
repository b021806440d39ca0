"""What the plan says of a GPU's memory, against what training takes there."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from full_size import configuration, plan_of_weightless, random_batch, random_model

from dreambooth.fixed_tensors import WARM_UP
from dreambooth.training.engine import TorchEngine
from dreambooth.training.graphed_engine import FixedStep, GraphedEngine
from pipelines.plan.capacity import USABLE
from pipelines.plan.memory import peak_bytes
from pipelines.worker.deepspeed_engine import DeepSpeedEngine

pytestmark = pytest.mark.filterwarnings("default")  # DeepSpeed uses what PyTorch deprecates

WITHIN, STEPS = 0.15, 3


def measured(base: Path, resolution: int, *overrides: str) -> int:
    """By how much the device's memory grows at most in a few steps."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    config = configuration(base, *overrides)
    model = random_model(base, config, device="cuda", autocast=True)
    step, failures = None, list[str]()
    engine: Any
    if config.train.graph == "auto":
        step = FixedStep("cuda", failures.append)
        engine = GraphedEngine(model, config.train, "cuda", step)
    elif config.engine == "torch":
        engine = TorchEngine(model, config.train, "cuda")
    else:
        engine = DeepSpeedEngine(model, config.train, config.zero, "cuda")
    try:
        for _ in range(STEPS if step is None else WARM_UP + STEPS):
            engine.backward(engine(random_batch(base, config, pairs=1, resolution=resolution)).total)
            engine.step()
        assert step is None or step.gradients.captured, failures
        return torch.cuda.max_memory_allocated() - before
    finally:
        engine.close()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all-activations", "checkpointing"])
@pytest.mark.parametrize(
    ("stage", "weights"),
    [(None, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16")],
    ids=["torch", "2", "1-bf16", "2-bf16"],
)
def test_full_size(full_size: Path, stage: int | None, weights: str, checkpointing: bool) -> None:
    """As large as Stable Diffusion 1.5, at 512 pixels, with matrix products in bf16."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    _compare(
        full_size,
        f"engine={'torch' if stage is None else 'deepspeed'}",
        f"zero.stage={stage or 0}",
        f"zero.weights={weights}",
        "train.mixed_precision=bf16",
        "train.micro_batch_size=1",
        f"train.gradient_checkpointing={str(checkpointing).lower()}",
    )


def test_full_size_captured(full_size: Path) -> None:
    """Its gradients stay, which those of an eager step don't."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    precision = ("train.mixed_precision=bf16", "train.micro_batch_size=1")
    _compare(full_size, "engine=torch", "train.graph=auto", *precision)


def _compare(base: Path, *overrides: str) -> None:
    expected = peak_bytes(plan_of_weightless(base, 512, *overrides, gpus=1))
    got = measured(base, 512, *overrides)
    print(f"planned {expected / 2**30:.2f} GiB, measured {got / 2**30:.2f} GiB")
    assert got == pytest.approx(expected, rel=WITHIN)


TORCH, DEEPSPEED = "engine=torch", "engine=deepspeed"
FUSED = ("train.fused_backward=true", "train.max_grad_norm=null")
OFFLOAD = (DEEPSPEED, "zero.offload_optimizer=true")
SMALL = {
    "adamw8bit": (TORCH, "train.optimizer=adamw8bit"),
    "adafactor": (TORCH, "train.optimizer=adafactor"),
    "adamw-fused": (TORCH, *FUSED),
    "adamw8bit-fused": (TORCH, "train.optimizer=adamw8bit", *FUSED),
    "adafactor-fused": (TORCH, "train.optimizer=adafactor", *FUSED),
    "1-offload": (*OFFLOAD, "zero.stage=1"),
    "2-offload": (*OFFLOAD, "zero.stage=2"),
    "3-offload-all": (*OFFLOAD, "zero.stage=3", "zero.offload_parameters=true"),
}
"""What the plan proposes for GPUs of 24 GB."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.extras("torchao")] if "8bit" in case else []) for case in SMALL],
)
def test_full_size_on_24_gigabytes(full_size: Path, case: str) -> None:
    """The same model by settings that take less. With the optimizer, gradients go to the host bucket by bucket."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    overrides = [
        *SMALL[case],
        "train.mixed_precision=bf16",
        "train.micro_batch_size=1",
        "train.gradient_checkpointing=true",
    ]
    plan = plan_of_weightless(full_size, 512, *overrides, gpus=1)
    expected, got = peak_bytes(plan), measured(full_size, 512, *overrides)
    print(f"planned {expected / 2**30:.2f} GiB, measured {got / 2**30:.2f} GiB")
    assert expected <= 24 * USABLE * 2**30
    assert got == pytest.approx(expected, rel=WITHIN)
