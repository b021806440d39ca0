"""Count the floating-point operations of a training step, on shapes alone: a second for a base model of any size."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.flop_counter import FlopCounterMode

from dreambooth.training.empty_step import EmptyStep


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Floating-point operations (a multiply-add is two) of a micro step of `pairs` pairs, forward and in all."""

    forward_flops: int
    flops: int


def step_cost(
    directory: Path, *, resolution: int, pairs: int, text_encoders: Sequence[str], checkpointing: bool
) -> StepCost:
    """Count a step of `pairs` instance/class pairs by running it on the meta device in fp32.

    With gradient checkpointing the second forward pass counts too.
    """
    step = EmptyStep(
        directory,
        resolution=resolution,
        images=2 * pairs,
        text_encoders=text_encoders,
        checkpointing=checkpointing,
    )
    counter = FlopCounterMode(display=False)
    with counter:
        loss = step.model_pred().sum()
        forward = counter.get_total_flops()
        loss.backward()
    return StepCost(forward_flops=forward, flops=counter.get_total_flops())
