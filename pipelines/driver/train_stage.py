"""The workers' task of a plan, and its result: a published model with the record of its training."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dreambooth.config.differences import differences
from pipelines.plan.memory import beside_pipeline_bytes
from pipelines.plan.run_plan import Plan
from pipelines.stages.published_model import find_model
from pipelines.storage.files import join, read_json
from pipelines.storage.publications import Manifest
from pipelines.tasks import Measurement, PriorSet, SecondStage, TrainTask


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A published, verified model and its training record: one mapping of metrics per step, bytes of memory by rank.

    `steps` counts steps made, `exported_step` is the step of the exported weights; `scores` has one mapping per score;
    `device` names rank 0's processor or GPU (None: trained by an earlier version).
    `second` is the record of a cascade's second stage, in the same model.
    """

    model: Manifest
    history: tuple[Mapping[str, float], ...]
    scores: tuple[Mapping[str, float], ...]
    steps: int
    exported_step: int
    peak_memory_bytes: tuple[int, ...]
    steps_per_second: float
    resumed_from: int
    device: str | None = None
    second: "TrainResult | None" = None

    @property
    def seconds(self) -> float:
        """Seconds in training steps of this command, both stages."""
        made = self.steps - self.resumed_from  # 0 of a first stage that was trained before
        own = made / self.steps_per_second if made else 0.0
        return own + (0.0 if self.second is None else self.second.seconds)


def find_result(plan: Plan) -> TrainResult | None:
    """The result of an earlier run of the same plan, or None."""
    manifest = find_model(plan.config, plan.key)
    if manifest is None:
        return None
    return _result(plan, manifest)


def _result(plan: Plan, manifest: Manifest) -> TrainResult:
    record = read_json(join(plan.config.run_uri, "training", f"{plan.key}.json"))
    return TrainResult(
        model=manifest,
        history=tuple(record["history"]),
        scores=tuple(record["scores"]),
        steps=record["steps"],
        exported_step=record["exported_step"],
        peak_memory_bytes=tuple(record["peak_memory_bytes"]),
        steps_per_second=record["steps_per_second"],
        resumed_from=record["resumed_from"],
        device=record.get("device"),
        second=None if plan.second is None else _result(plan.second, manifest),
    )


def train_task(plan: Plan, prior_set: PriorSet | None) -> TrainTask:
    """The task of a plan's workers."""
    return TrainTask(
        config=plan.config,
        images=plan.images,
        prior_set=prior_set,
        measurement=_measurement(plan),
        engine=plan.engine,
        key=plan.key,
        data_hash=plan.data_hash,
        base_hash=plan.base.hash,
        checkpoint_bytes=plan.checkpoint_bytes,
        sampling_dtype=plan.sampling_dtype,
        gpu_bytes=beside_pipeline_bytes(plan) if plan.use_gpu else 0,
        second=None if plan.second is None else _second_stage(plan, plan.second),
    )


def _measurement(plan: Plan) -> Measurement | None:
    if not plan.evaluations:
        return None
    sampler = plan.base.family.sampler_name
    if (task := plan.protocol) is None:
        return Measurement(sampler=sampler)
    others = None if task.images == plan.images else replace(plan.compared, warnings=())
    return Measurement(sampler=sampler, bank=task.bank, compared=others)


def _second_stage(first: Plan, second: Plan) -> SecondStage:
    unplanned = first.config.second_stage
    assert unplanned is not None
    return SecondStage(
        settings=differences(second.config, unplanned),
        engine=second.engine,
        key=second.key,
        base_hash=second.base.hash,
        checkpoint_bytes=second.checkpoint_bytes,
        gpu_bytes=beside_pipeline_bytes(second) if second.use_gpu else 0,
    )
