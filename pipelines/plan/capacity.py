"""The fewest GPUs that a subject can be trained on, by their memory and ZeRO's stage; what to change where none fit.

Of a plan with a GPU for each worker, whatever this machine has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dreambooth.amounts import counted, readable_bytes
from pipelines.cluster.gpus import USABLE
from pipelines.plan.changes import for_more_gpus, for_the_same_gpus, stages_of
from pipelines.plan.memory import peak_of, sampling_peak
from pipelines.plan.run_plan import Plan
from pipelines.plan.sampling_memory import weights_bytes

GPU_SIZES = (24, 80, 141)
"""Memory of common GPUs in GB: RTX 4090 and A10G; A100 and H100; H200."""
STAGES = (0, 1, 2, 3)
MOST_GPUS = 64
_USABLE = USABLE * 2**30


@dataclass(frozen=True, kw_only=True)
class Fewest:
    """The fewest GPUs of a size by ZeRO's stage, without those that no number up to `MOST_GPUS` is enough for.

    `changes` are the settings that it takes beyond those of the plan.
    """

    size: int
    by_stage: dict[int, int]
    changes: tuple[str, ...] = ()


def on_gpus(plan: Plan) -> Plan:
    """The same plan on GPUs, which multiply in bf16 by default."""
    train = plan.config.train
    precision = "no" if train.mixed_precision == "no" else "bf16"
    changed = train.model_copy(update={"mixed_precision": precision})
    return replace(plan, use_gpu=True, config=plan.config.model_copy(update={"train": changed}))


def fewest_gpus(plan: Plan, size: int) -> Fewest:
    """The fewest GPUs of `size` GB, with no more changes than it takes for any stage to fit."""
    for changed, changes, stages in for_more_gpus(on_gpus(plan)):
        by_stage = {stage: count for stage in stages if (count := _fewest(changed, stage, size)) is not None}
        if by_stage:
            return Fewest(size=size, by_stage=by_stage, changes=changes)
    return Fewest(size=size, by_stage={}, changes=changes)


def cheapest_fit(plan: Plan, size: int) -> tuple[tuple[str, ...], int] | None:
    """The changes, and ZeRO's stage, by which the plan fits as many GPUs of `size` GB as it has workers."""
    workers = plan.config.cluster.num_workers
    for changed, changes, stages in for_the_same_gpus(on_gpus(plan)):
        for stage in stages:
            if peak_of(changed, stage, workers) <= size * _USABLE:
                return changes, stage
    return None


def describe_capacity(plan: Plan) -> list[tuple[str, str]]:
    """(what, value) rows: memory by stage on the plan's workers, before and after it, and the fewest GPUs by size.

    Those of a cascade's second stage, trained after the first, follow.
    """
    weights, batch = weights_bytes(plan.bases), sampling_peak(plan) - weights_bytes(plan.bases)
    samples = f"{readable_bytes(weights)} of weights in fp16 and {readable_bytes(batch)} for a batch, on one GPU"
    rows = [*_training(plan), ("samples", samples), *_sizes(plan)]
    if plan.second is not None:
        rows += [(f"second stage: {what}", value) for what, value in (*_training(plan.second), *_sizes(plan.second))]
    return rows


def _training(plan: Plan) -> list[tuple[str, str]]:
    """Memory of a stage in training, and before it."""
    workers = plan.config.cluster.num_workers
    peaks = [f"ZeRO-{stage} {readable_bytes(peak_of(on_gpus(plan), stage, workers))}" for stage in stages_of(plan)]
    rows = [(f"peak on {counted(workers, 'GPU')}", ", ".join(peaks))]
    if frozen := _frozen_text_encoders(plan):
        parts = ", ".join(f"{folder} {readable_bytes(4 * count)}" for folder, count in frozen.items())
        rows.append(("prompts encoded by", f"{parts}, once, in main memory from then on"))
    return rows


def _sizes(plan: Plan) -> list[tuple[str, str]]:
    rows = []
    for size in GPU_SIZES:
        fewest, fit = _shown(fewest_gpus(plan, size)), cheapest_fit(plan, size)
        cheapest = "" if fit is None or not fit[0] else f"; {_with_changes(plan, *fit)}"
        rows.append((f"{size} GB GPUs", fewest + cheapest))
    return rows


def _with_changes(plan: Plan, changes: tuple[str, ...], stage: int) -> str:
    at_stage = f" at ZeRO-{stage}" if stage else ""
    return f"{plan.config.cluster.num_workers}{at_stage} with {_and_list(changes)}"


def _frozen_text_encoders(plan: Plan) -> dict[str, int]:
    """Parameters of text encoders that no step runs."""
    present = plan.base.text_encoders
    return {folder: plan.base.parameter_counts[folder] for folder in present if folder not in plan.run_text_encoders}


def _shown(fewest: Fewest) -> str:
    if not fewest.by_stage:
        tried = f", not even with {_and_list(fewest.changes)}" if fewest.changes else ""
        return f"none up to {MOST_GPUS}{tried}; take larger ones, or a lower images.resolution"
    counts = ", ".join(f"{count} at ZeRO-{stage}" for stage, count in fewest.by_stage.items())
    return f"{counts}{f', with {_and_list(fewest.changes)}' if fewest.changes else ''}"


def _and_list(words: Sequence[str]) -> str:
    """'a, b and c'."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def _fewest(plan: Plan, stage: int, size: int) -> int | None:
    if plan.footprint.state_bytes(stage, MOST_GPUS) > size * _USABLE:
        return None  # known without counting a step
    counts = range(1, MOST_GPUS + 1) if stage else (1,)  # without ZeRO each has everything
    return next((count for count in counts if peak_of(plan, stage, count) <= size * _USABLE), None)
