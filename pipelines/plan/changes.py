"""Settings that take less memory, the cheapest first, and the plans that they make of one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pipelines.plan.run_plan import Plan


class Changed(NamedTuple):
    """A plan with changes, by name, and the stages of ZeRO that can train it."""

    plan: Plan
    changes: tuple[str, ...]
    stages: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Change:
    """Settings that take less memory. `stages` are those of ZeRO that know them; 0 is none, and plain PyTorch."""

    name: str
    train: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    stages: tuple[int, ...] = (0, 1, 2, 3)

    def helps(self, plan: Plan) -> bool:
        """Whether it would change this plan, and go with its other settings."""
        config = plan.config
        if config.engine == ("deepspeed" if self.stages == (0,) else "torch" if self.zero else None):
            return False
        if "text_encoders" in self.train:
            return plan.trains_text_encoders
        of_states = self.zero or "optimizer" in self.train
        if of_states and (config.train.method != "dreambooth" or config.train.optimizer != "adamw"):
            return False
        alone = config.train.gradient_accumulation_steps == 1 and config.cluster.num_workers == 1
        if self.train.get("fused_backward") and not alone:
            return False
        return any(
            getattr(group, name) != value
            for group, settings in ((config.train, self.train), (config.zero, self.zero))
            for name, value in settings.items()
        )

    def of(self, plan: Plan) -> Plan:
        """The plan with this change."""
        config = plan.config
        groups = {"train": config.train.model_copy(update=self.train), "zero": config.zero.model_copy(update=self.zero)}
        return replace(plan, config=config.model_copy(update=groups))


CHECKPOINTING = _Change(name="train.gradient_checkpointing", train={"gradient_checkpointing": True})
OFFLOAD = _Change(name="zero.offload_optimizer", zero={"offload_optimizer": True}, stages=(1, 2, 3))
FROZEN_TEXT = _Change(name="train.text_encoders: none", train={"text_encoders": "none"})
OFFLOAD_ALL = _Change(name="zero.offload_parameters", zero={"offload_parameters": True}, stages=(3,))
_8BIT = _Change(name="train.optimizer: adamw8bit", train={"optimizer": "adamw8bit"}, stages=(0,))
_ADAFACTOR = _Change(name="train.optimizer: adafactor", train={"optimizer": "adafactor"}, stages=(0,))
_FUSED = _Change(
    name="train.fused_backward (train.max_grad_norm: null)",
    train={"fused_backward": True, "max_grad_norm": None},
    stages=(0,),
)

_FOR_MORE_GPUS = (
    (),
    (CHECKPOINTING,),
    (CHECKPOINTING, OFFLOAD),
    (CHECKPOINTING, OFFLOAD, OFFLOAD_ALL),
    (CHECKPOINTING, OFFLOAD, OFFLOAD_ALL, FROZEN_TEXT),
)
"""Each beside the one before: what GPUs alone don't cure."""

_FOR_THE_SAME_GPUS = (
    (),
    (CHECKPOINTING,),
    (CHECKPOINTING, _8BIT),
    (CHECKPOINTING, _ADAFACTOR),
    (CHECKPOINTING, _ADAFACTOR, _FUSED),
    (CHECKPOINTING, OFFLOAD),
    (CHECKPOINTING, OFFLOAD, OFFLOAD_ALL),
    (CHECKPOINTING, _ADAFACTOR, _FUSED, FROZEN_TEXT),
    (CHECKPOINTING, OFFLOAD, OFFLOAD_ALL, FROZEN_TEXT),
)
"""The cheapest first: what takes time, what is rounded, what waits for the host, what isn't learnt."""


def stages_of(plan: Plan) -> tuple[int, ...]:
    """ZeRO's stages that can train a plan by its settings; 0 is none, and plain PyTorch."""
    train, zero = plan.config.train, plan.config.zero
    if plan.config.engine == "torch" or train.optimizer != "adamw" or train.fused_backward:
        return (0,)
    if zero.offload_parameters:
        return (3,)
    return (1, 2, 3) if zero.offload_optimizer or zero.weights == "bf16" else (0, 1, 2, 3)


def for_more_gpus(plan: Plan) -> Iterator[Changed]:
    """The plan as it is, and with one change more at a time."""
    return _each(plan, _FOR_MORE_GPUS)


def for_the_same_gpus(plan: Plan) -> Iterator[Changed]:
    """The plan as it is, and with changes that need no further GPU.

    Several workers with an optimizer that ZeRO can't divide are trained by plain PyTorch, as one worker is.
    """
    for changed in _each(plan, _FOR_THE_SAME_GPUS):
        alone = plan.config.cluster.num_workers == 1
        # One worker is trained by plain PyTorch unless a change is ZeRO's.
        stages = changed.stages[:1] if alone and 0 in changed.stages else changed.stages
        yield changed._replace(stages=stages)


def _each(plan: Plan, groups: Sequence[Sequence[_Change]]) -> Iterator[Changed]:
    seen: set[tuple[str, ...]] = set()
    for group in groups:
        names: tuple[str, ...] = ()
        made, stages = plan, stages_of(plan)
        for change in group:
            if change.helps(made):
                made, names = change.of(made), (*names, change.name)
                stages = tuple(stage for stage in stages if stage in change.stages)
        if names not in seen and stages:
            seen.add(names)
            yield Changed(made, names, stages)
