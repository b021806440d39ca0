"""Memory of one worker by ZeRO's stage and the number of workers, as pure arithmetic.

ZeRO divides over workers as in its paper (arXiv 1910.02054, section 3.1). Masters, moments and sums of gradients are
fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass

_LIVE_PARAMETERS = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most: DeepSpeed's stage3_max_live_parameters."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What memory follows from, besides stage and workers.

    `trained` and `frozen` are numbers of parameters, the latter of modules that every step runs without training them.
    `moments` are bytes of the optimizer's state (None: Adam's, in fp32), `update` those that the update of the largest
    parameter takes beside it. With `fused_backward` each gradient is freed within the backward pass. `bucket` are
    bytes of DeepSpeed's buckets of gradients. With `halves_apart` the denoiser is called twice before a backward pass.
    `weight` are the bytes of each weight that steps compute with, and of its gradient as it is sent: 2 in bf16.
    `captured` steps keep gradients from one to the next, and a pool of memory as large as both passes need. A step that
    `accumulates` is of several micro steps.
    """

    trained: int
    frozen: int = 0
    moments: int | None = None
    update: int = 0
    average: bool = False
    fused_backward: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 0
    halves_apart: bool = False
    weight: int = 4
    captured: bool = False
    accumulates: bool = False

    def state_bytes(self, stage: int, workers: int) -> int:
        """Weights, gradients, masters, moments and moving average, activations not counted."""
        on_device = 0 if self.offload_optimizer else self._optimizer_bytes(stage) / (workers if stage else 1)
        weights = 0 if self.offload_parameters else self.weight / (workers if stage == 3 else 1)
        gradients = self._gradients(stage, workers)
        return int(self.trained * (weights + gradients) + on_device) + int(weights * self.frozen)

    def host_bytes(self, stage: int, workers: int) -> int:
        """What DeepSpeed keeps in main memory instead of on the device, with a worker's part of the gradients.

        Beside it there is a buffer, too (DeepSpeed 0.19.8): ZeRO-3 sums gradients in one, and earlier stages send
        updated weights from one.
        """
        if not self.offload_optimizer:
            return 0
        buffer = 4 if stage == 3 else self.weight
        weights = self.weight * (self.trained + self.frozen) if self.offload_parameters else 0
        return int(self._optimizer_bytes(stage) + (4 + buffer) * self.trained + weights) // workers

    def _optimizer_bytes(self, stage: int) -> int:
        """Moments, masters and moving average, undivided."""
        moments = 8 * self.trained if self.moments is None else self.moments
        return moments + ((4 if stage else 0) + (4 if self.average else 0)) * self.trained

    def _gradients(self, stage: int, workers: int) -> float:
        """Bytes of gradients on the device per trained parameter, when a backward pass has ended."""
        if self.fused_backward:
            return 0
        if not self.offload_optimizer:
            return 4 / (workers if stage >= 2 else 1)
        # DeepSpeed 0.19.8 moves gradients to the host bucket by bucket, within the backward pass
        # (`copy_grads_in_partition` in stage_1_and_2.py, `partition_grads` in stage3.py). ZeRO-1 does so in the last
        # pass of a step, and lets them accumulate on the device before. For bf16 weights, ZeRO-1 and 2 add them up in
        # a worker's fp32 partition there, which is copied (`_use_compact_grad_partition_buffer`).
        summed = 4 / workers if self.weight < 4 and stage < 3 else 0
        return summed + (4 if stage == 1 and self.accumulates else 0)

    def peak_bytes(self, stage: int, workers: int, step_bytes: Callable[[bool], int]) -> int:
        """Peak of a step; `step_bytes(keep_gradients)` are those of its passes beyond the weights."""
        if self.fused_backward:
            return self.state_bytes(stage, workers) + step_bytes(False)
        if self.captured:
            return self.state_bytes(stage, workers) + max(step_bytes(False), self.update)
        state, gradients = self.state_bytes(stage, workers), 4 * self.trained
        if stage >= 2 or self.offload_optimizer:
            # A module called twice before its backward pass stays gathered once the first of them has ended (DeepSpeed
            # 0.19.8, parameter_offload.py).
            live = self.trained if self.halves_apart else min(self.trained, _LIVE_PARAMETERS)
            return state + step_bytes(False) + self.bucket + (self.weight * live if stage == 3 else 0)
        if stage == 1 and self.weight < 4:
            # Each gradient is added to its fp32 sum at once. Of all sums DeepSpeed's BF16_Optimizer makes one piece,
            # and a copy of that to be sent.
            return state + max(step_bytes(False), (4 + self.weight) * self.trained)
        steady = state - gradients
        # Those of earlier micro steps are there while activations are; without any, they come as activations go.
        step = gradients + step_bytes(False) if self.accumulates else step_bytes(True)
        if stage == 0:
            # To be averaged over ranks, gradients are copied into one piece.
            return steady + max(step, gradients * (2 if workers > 1 else 1), gradients + self.update)
        return steady + max(step + self.bucket, gradients + gradients // workers)
