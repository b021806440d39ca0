"""A cascade trained as a lane's worker does, and what is compared of it."""

from typing import Any

import torch

from pipelines.driver.train_stage import train_task
from pipelines.plan.run_plan import Plan
from pipelines.worker.publish import TrainedStage
from pipelines.worker.stage_training import StageTraining

FIRST, SECOND = 3, 5
SCORED = (
    "evaluation.every=2",
    "evaluation.bank=miniature",
    "evaluation.prompts=['a [V] {class_noun}', '[V] at night']",
    "evaluation.num_inference_steps=2",
    "storage.dtype=float32",
)


class Killed(Exception):
    """Stands for whatever ends a process in the middle of a training."""


def trained(plan: Plan, *, until: tuple[int, int] | None = None) -> list[TrainedStage]:
    """Train as a new worker does; `until` ends it after a step of a stage."""
    stages: list[TrainedStage] = []
    for place, task in enumerate(train_task(plan, None).stages):

        def tell(message: dict[str, Any], place: int = place) -> None:
            if message["kind"] == "step" and (place, message["metrics"]["step"]) == until:
                raise Killed

        stage = StageTraining("cpu", 0, scales_up=place == 1)
        stages.append(stage.train(task, tell, lambda: False, stages[0] if place else None))
    return stages


def losses(stage: TrainedStage) -> list[float]:
    return [step["loss"] for step in stage.tuned.record["history"]]


def assert_same(one: TrainedStage, other: TrainedStage) -> None:
    assert losses(one) == losses(other)
    assert one.tuned.state.keys() == other.tuned.state.keys()
    assert [name for name, tensor in one.tuned.state.items() if not torch.equal(tensor, other.tuned.state[name])] == []
