"""Memory of a worker: weights and optimizer as ZeRO shards them, and a traced step."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dreambooth.amounts import readable_bytes
from dreambooth.config.limits import SAMPLED_TOGETHER
from dreambooth.training.graphable import why_not_graphed
from dreambooth.training.optimizer_memory import UPDATE_BYTES
from pipelines.plan.counted import counted
from pipelines.plan.run_plan import Plan
from pipelines.plan.sampling_memory import batch_bytes, weights_bytes


def peak_bytes(plan: Plan) -> int:
    """Peak bytes of tensors on the device of one worker.

    Libraries come on top: some 500 MiB of main memory, and CUDA's context on a GPU.
    """
    return peak_of(plan, plan.zero_stage, plan.config.cluster.num_workers)


def peak_of(plan: Plan, stage: int, workers: int) -> int:
    """What `peak_bytes` would be with another stage of ZeRO and number of workers."""
    footprint = replace(
        plan.footprint,
        bucket=_bucket_bytes(plan, plan.footprint.weight),
        halves_apart=_halves_apart(plan),
        captured=_captured(plan, workers),
    )
    peak = footprint.peak_bytes(stage, workers, partial(_step_bytes, plan))
    if plan.config.evaluation.every is None or not plan.use_gpu:
        return peak
    # The first worker keeps the pipeline that scores are sampled from, and samples between two steps.
    alone = replace(plan, second=None)
    weights = weights_bytes(alone.bases)
    return weights + max(peak, footprint.state_bytes(stage, workers) + sampling_peak(alone) - weights)


def sampling_peak(plan: Plan) -> int:
    """Peak bytes of tensors on a GPU that makes class images or samples: a pipeline's weights and one batch."""
    batches = {(SAMPLED_TOGETHER, plan.config.evaluation.guidance_scale)}
    if plan.prior is not None:
        batches.add((plan.prior.batch_size, plan.prior.guidance_scale))
    sides = {stage.base: int(stage.config.images.resolution or stage.base.resolution) for stage in plan.stages}
    return weights_bytes(plan.bases) + max(
        batch_bytes(base, side, images=images, guided=base.family.guides(scale))
        for base, side in sides.items()
        for images, scale in batches
    )


def beside_pipeline_bytes(plan: Plan) -> int:
    """Peak bytes of tensors on a GPU that trains while the pipeline of its class images stays there.

    Captured steps keep their memory, too: the pipeline's while a subject is trained, and those of training, of each
    stage, while samples are made.
    """
    graphs = plan.config.train.graph, plan.config.cluster.graph_sampling
    kept = sampling_peak(plan) if "auto" in graphs else weights_bytes(plan.bases)
    peaks = [peak_bytes(stage) for stage in plan.stages]
    return (sum(peaks) if graphs[0] == "auto" else max(peaks)) + kept


def describe_peak(plans: Sequence[Plan]) -> tuple[str, str]:
    """The largest peak of these plans' stages, as a (what, value) row."""
    most = max(peak_bytes(stage) for plan in plans for stage in plan.stages)
    return "memory at its peak", f"about {readable_bytes(most)} of tensors a worker"


def _captured(plan: Plan, workers: int) -> bool:
    """Whether steps are captured as CUDA graphs."""
    train = plan.config.train
    if train.graph == "off" or plan.engine != "torch" or not plan.use_gpu:
        return False
    return why_not_graphed(train, "cuda", workers, sizes=len(set(plan.sizes))) is None


def _bucket_bytes(plan: Plan, each: int) -> int:
    from pipelines.worker.deepspeed_engine import REDUCE_BUCKET

    return each * REDUCE_BUCKET * (2 if plan.use_gpu else 1)  # on a GPU one is filled while another is sent


def _halves_apart(plan: Plan) -> bool:
    """Whether the denoiser is called for each half of a batch, as in `TrainingData.halves_apart`."""
    side = int(plan.config.images.resolution or plan.base.resolution)
    return plan.prior is not None and any(size != (side, side) for size in plan.sizes)


def _largest_size(plan: Plan) -> tuple[int, int]:
    """The size of the largest images of a step; class images are square, and no bucket has more pixels."""
    side = int(plan.config.images.resolution or plan.base.resolution)
    if plan.prior is not None or not plan.sizes:
        return side, side
    return max(plan.sizes, key=math.prod)


def _step_bytes(plan: Plan, keep_gradients: bool) -> int:
    train = plan.config.train
    asked: dict[str, Any] = {
        "size": _largest_size(plan),
        "images": train.micro_batch_size * (1 if plan.prior is None else 2),
        "text_encoders": plan.run_text_encoders,
        "checkpointing": train.gradient_checkpointing,
        "autocast": train.mixed_precision == "bf16",
    }
    if plan.footprint.weight == 2:
        asked["bf16_weights"] = True
    if train.fused_backward:
        asked["update_bytes"] = UPDATE_BYTES[train.optimizer]

    def count() -> tuple[int, int]:
        from dreambooth.training.step_memory import step_memory

        return step_memory(plan.base.directory, **asked)

    released, kept = counted("step-memory", plan.base, asked, count)
    return int(kept if keep_gradients else released)
