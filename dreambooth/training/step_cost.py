"""What does a training step cost? Counted on shapes alone, so it takes a second whatever the size of the base model."""

from dataclasses import dataclass
from pathlib import Path

from torch.utils.flop_counter import FlopCounterMode

from dreambooth.training.empty_step import EmptyStep


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Of one micro step of `pairs` pairs: floating-point operations (a multiply-add is two) forward and with the
    backward pass.
    """

    forward_flops: int
    flops: int


def step_cost(
    directory: Path, *, resolution: int, pairs: int, train_text_encoder: bool, checkpointing: bool
) -> StepCost:
    """Run a step of `pairs` instance/class pairs on the meta device, in fp32, and count.

    With gradient checkpointing, the second forward pass is counted too.
    """
    step = EmptyStep(
        directory,
        resolution=resolution,
        images=2 * pairs,
        train_text_encoder=train_text_encoder,
        checkpointing=checkpointing,
    )
    counter = FlopCounterMode(display=False)
    with counter:
        loss = step.model_pred().sum()
        forward = counter.get_total_flops()
        loss.backward()
    return StepCost(forward_flops=forward, flops=counter.get_total_flops())
