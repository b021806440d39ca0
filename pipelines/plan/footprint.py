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
    `captured` steps keep gradients from one to the next, and a pool of memory as large as both passes need.
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

    def state_bytes(self, stage: int, workers: int) -> int:
        """Weights, gradients, masters, moments and moving average, activations not counted."""
        moments = 8 * self.trained if self.moments is None else self.moments
        optimizer = moments + ((4 if stage else 0) + (4 if self.average else 0)) * self.trained
        on_device = 0 if self.offload_optimizer else optimizer / (workers if stage else 1)
        weights = 0 if self.offload_parameters else self.weight / (workers if stage == 3 else 1)
        gradients = 0 if self.fused_backward else 4 / (workers if stage >= 2 else 1)
        return int(self.trained * (weights + gradients) + on_device) + int(weights * self.frozen)

    def peak_bytes(self, stage: int, workers: int, step_bytes: Callable[[bool], int]) -> int:
        """Peak of a step; `step_bytes(keep_gradients)` are those of its passes beyond the weights."""
        if self.fused_backward:
            return self.state_bytes(stage, workers) + step_bytes(False)
        if self.captured:
            return self.state_bytes(stage, workers) + max(step_bytes(False), self.update)
        gradients = 4 * self.trained
        steady = self.state_bytes(stage, workers) - gradients // (workers if stage >= 2 else 1)
        step = step_bytes(stage < 2)
        if stage == 0:
            # To be averaged over ranks, gradients are copied into one piece.
            return steady + max(step, gradients * (2 if workers > 1 else 1), gradients + self.update)
        if stage == 1 and self.weight < 4:
            # Each gradient is added to its fp32 sum at once. Of all sums DeepSpeed's BF16_Optimizer makes one piece,
            # and a copy of that to be sent; with the optimizer in host memory it sends buckets.
            steady += gradients
            if self.offload_optimizer:
                return steady + step_bytes(False) + self.bucket
            return steady + max(step_bytes(False), (4 + self.weight) * self.trained)
        if stage == 1:
            return steady + max(step + self.bucket, gradients + gradients // workers)
        # A module called twice before its backward pass stays gathered once the first of them has ended (DeepSpeed
        # 0.19.8, parameter_offload.py).
        live = self.trained if self.halves_apart else min(self.trained, _LIVE_PARAMETERS)
        gathered = self.weight * live if stage == 3 else 0
        return steady + step + self.bucket + gradients // workers + gathered
