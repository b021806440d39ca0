"""The type of a plan's fixture."""

from collections.abc import Callable

from pipelines.plan.run_plan import Plan

MachinePlan = Callable[..., Plan]
BF16_WEIGHTS = "zero.weights=bf16", "train.mixed_precision=bf16"
