"""Memory of a worker: weights and optimizer as ZeRO shards them, and a traced step."""

from collections.abc import Sequence
from typing import Any

from pipelines.plan.counted import counted
from pipelines.plan.describe import readable_bytes
from pipelines.plan.run_plan import Plan

_LIVE_PARAMETERS = 1_000_000_000
"""Most parameters that ZeRO-3 keeps gathered: DeepSpeed's stage3_max_live_parameters."""


def peak_bytes(plan: Plan) -> int:
    """Peak bytes of tensors on the device of one worker.

    Libraries come on top: some 500 MiB of main memory, and CUDA's context on a GPU.
    """
    config, workers = plan.config, plan.config.cluster.num_workers
    stage = config.zero.stage if plan.engine == "deepspeed" else 0
    gradients = 4 * plan.trained_parameters
    steady = plan.model_state_bytes - gradients // (workers if stage >= 2 else 1)
    step = _step_bytes(plan, keep_gradients=stage < 2)
    if stage == 0:
        # Gradients are copied into one buffer to average them over ranks.
        return steady + max(step, gradients * (2 if workers > 1 else 1))
    bucket = _bucket_bytes(plan)
    if stage == 1:
        return steady + max(step + bucket, gradients + gradients // workers)
    gathered = 4 * min(plan.trained_parameters, _LIVE_PARAMETERS) if stage == 3 else 0
    return steady + step + bucket + gradients // workers + gathered


def describe_peak(plans: Sequence[Plan]) -> tuple[str, str]:
    """The largest peak of these plans, as a (what, value) row."""
    return "memory at its peak", f"about {readable_bytes(max(peak_bytes(plan) for plan in plans))} of tensors a worker"


def _bucket_bytes(plan: Plan) -> int:
    from pipelines.worker.deepspeed_engine import REDUCE_BUCKET

    return 4 * REDUCE_BUCKET * (2 if plan.use_gpu else 1)  # on a GPU one is filled while another is sent


def _step_bytes(plan: Plan, *, keep_gradients: bool) -> int:
    train = plan.config.train
    asked: dict[str, Any] = {
        "resolution": int(plan.config.images.resolution or plan.base.resolution),
        "images": train.micro_batch_size * (1 if plan.prior is None else 2),
        "text_encoders": plan.run_text_encoders,
        "checkpointing": train.gradient_checkpointing,
        "autocast": train.mixed_precision == "bf16",
        "keep_gradients": keep_gradients,
    }

    def count() -> int:
        from dreambooth.training.step_memory import step_memory

        return step_memory(plan.base.directory, **asked)

    return int(counted("step-memory", plan.base, asked, count))
