"""Estimate a batch's time and memory.

Time comes from the pace of earlier batches if known; else from counted operations and the measured speed of the
cluster.
"""

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

from dreambooth.training.step_cost import StepCost
from pipelines.plan.batch_plan import BatchPlan
from pipelines.plan.counted import counted
from pipelines.plan.memory import describe_peak
from pipelines.plan.pace import known_paces, pace_key
from pipelines.plan.run_plan import Plan
from pipelines.stages.prior_stage import images_present

_MATRIX = {"cpu": 512, "cuda": 4096}
_SMALL_MATRIX = 256
"""On a CPU: a product of a fraction of a millisecond, which even a busy machine lets one thread finish undisturbed."""
_SHARE_IN_TRAINING = {"cpu": 0.3, "cuda": 0.05}
_SHARE_IN_SAMPLING = {"cpu": 0.6, "cuda": 0.05}
"""Of the speed of a large matrix product that is reached: by the miniature in two lanes on two CPU cores; and by Stable
Diffusion 1.5's size in training on an H200, 32 TFLOP/s, if a product reaches two thirds of its data sheet's 989."""
_START_SECONDS = 30.0
_ANSWER_SECONDS = 60.0
_MEASURE_SECONDS = 0.3
_LEAST_TIMES = 5
_BUSY = 1.25
"""Load per core above which the estimate mentions other work."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Floating-point operations per second of one worker, in fp32 and in half precision, when nobody disturbs it.

    `load` is how many processes wanted to work there, on average over the last minute, on `cores`.
    """

    fp32: float
    half: float
    load: float = 0.0
    cores: int = 1


def describe_estimate(plan: BatchPlan) -> list[tuple[str, str]]:
    """(what, value) rows. Needs a Ray that is joined, if the plan is for a cluster and not for this machine."""
    costs = {subject.config.subject.name: _cost(subject) for subject in plan.subjects}
    time_by_pace = _by_pace(plan)
    return [
        describe_peak(plan.subjects),
        ("time", _by_counting(plan, costs) if time_by_pace is None else time_by_pace),
    ]


def _by_pace(plan: BatchPlan) -> str | None:
    """Estimate by the pace of earlier batches, on any machines; None if a subject's settings are new."""
    known = known_paces(plan.subjects[0].config.storage.root)
    stages = [stage for subject in plan.subjects for stage in subject.stages]
    found = [known.get(pace_key(stage)) for stage in stages]
    paces = [pace for pace in found if pace is not None]
    if len(paces) < len(found):
        return None
    steps = [stage.config.train.max_train_steps for stage in stages]
    seconds = sum(count / pace.steps_per_second for count, pace in zip(steps, paces, strict=True))
    latest = max(paces, key=lambda pace: pace.day)
    return (
        f"about {clock(seconds / plan.lanes)} of steps in each lane, at the {latest.steps_per_second:.1f} steps/s "
        f"a subject of batch {latest.batch} on {latest.day}"
    )


def _by_counting(plan: BatchPlan, costs: dict[str, StepCost]) -> str:
    """Estimate by counted operations and measured speed."""
    speed = _measured(plan)
    if speed is None:
        return f"not estimated: no worker answered within {_ANSWER_SECONDS:.0f} s"
    device = "cuda" if plan.use_gpu else "cpu"
    samples_in_half = plan.subjects[0].sampling_dtype != "float32"
    sampling_speed = _SHARE_IN_SAMPLING[device] * (speed.half if samples_in_half else speed.fp32)
    training = samples = 0.0
    for subject in plan.subjects:
        of_stages = [(subject, costs[subject.config.subject.name])]
        of_stages += [] if subject.second is None else [(subject.second, _cost(subject.second))]
        half = subject.config.train.mixed_precision == "bf16"
        training_speed = _SHARE_IN_TRAINING[device] * (speed.half if half else speed.fp32)
        training += sum(_training_flops(stage, cost) for stage, cost in of_stages) / training_speed
        samples += sum(_sampling_flops(stage, cost) for stage, cost in of_stages) / sampling_speed
    class_images = _class_image_flops(plan, costs) / sampling_speed
    workers = plan.lanes * plan.cluster.num_workers
    parts = [training / workers, class_images / workers, samples / plan.lanes]
    shown = ", ".join(
        f"{what} {clock(part)}" for what, part in zip(("training", "class images", "samples"), parts, strict=True)
    )
    return f"about {clock(_START_SECONDS + sum(parts))}: {shown}{about_load(speed) if device == 'cpu' else ''}"


def about_load(speed: Speed) -> str:
    """A remark on an estimate whose speed was measured beside other work."""
    if speed.load <= _BUSY * speed.cores:
        return ""
    return (
        f"; measured while the machine was busy (load {speed.load:.0f} on {speed.cores} cores): longer as long as it is"
    )


def clock(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def measure_speed(device: str, num_threads: int) -> Speed:
    """Speed of matrix products here: the fastest of several, since other work only slows them down."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        fastest = [_matmul_speed(device, _MATRIX[device], half=half) for half in (False, True)]
        if device == "cpu":
            # Threads that wait for each other on a busy machine say nothing of what they do when it is not.
            torch.set_num_threads(1)
            alone = [_matmul_speed(device, _SMALL_MATRIX, half=half) for half in (False, True)]
            fastest = [max(f, max(1.0, num_threads / 2) * a) for f, a in zip(fastest, alone, strict=True)]
    finally:
        torch.set_num_threads(before)
    return Speed(fp32=fastest[0], half=fastest[1], load=os.getloadavg()[0], cores=os.cpu_count() or 1)


def _matmul_speed(device: str, size: int, *, half: bool) -> float:
    import torch

    times: list[float] = []
    one = torch.ones(size, size, device=device, dtype=torch.bfloat16 if half else torch.float32)
    began = time.perf_counter()
    # bf16 is slow where the CPU has none; but a single time may be of anything.
    while len(times) < _LEAST_TIMES or time.perf_counter() - began < _MEASURE_SECONDS:
        start = time.perf_counter()
        float((one @ one)[0, 0])  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def _measured(plan: BatchPlan) -> Speed | None:
    device, num_threads = "cuda" if plan.use_gpu else "cpu", plan.cluster.cpus_per_worker
    if plan.cluster.address is None:
        return measure_speed(device, num_threads)
    import ray
    from ray.exceptions import GetTimeoutError

    measure = ray.remote(measure_speed).options(num_cpus=num_threads, num_gpus=1 if plan.use_gpu else 0)
    answer = measure.remote(device, num_threads)
    try:
        speed: Speed = ray.get(answer, timeout=_ANSWER_SECONDS)
    except GetTimeoutError:
        ray.cancel(answer, force=True)
        return None
    return speed


def _cost(plan: Plan) -> StepCost:
    train = plan.config.train
    asked: dict[str, Any] = {
        "resolution": int(plan.config.images.resolution or plan.base.resolution),
        "pairs": train.micro_batch_size,
        "text_encoders": plan.run_text_encoders,
        "checkpointing": train.gradient_checkpointing,
    }

    def count() -> dict[str, int]:
        from dreambooth.training.step_cost import step_cost

        return asdict(step_cost(plan.base.directory, **asked))

    return StepCost(**counted("step-cost", plan.base, asked, count))


def _training_flops(plan: Plan, cost: StepCost) -> float:
    train = plan.config.train
    micro_steps = train.max_train_steps * train.gradient_accumulation_steps * plan.config.cluster.num_workers
    return cost.flops * micro_steps * (1.0 if plan.prior is not None else 0.5)  # alone, an image is half of a pair


def _sampling_flops(plan: Plan, cost: StepCost) -> float:
    """Operations of the evaluation's samples, before and after."""
    evaluation = plan.config.evaluation
    if not evaluation.enabled:
        return 0.0
    images = 2 * evaluation.images_per_prompt * (len(evaluation.prompts) + 2)
    return images * evaluation.num_inference_steps * _guided(plan, cost)


def _class_image_flops(plan: BatchPlan, costs: dict[str, StepCost]) -> float:
    owners = {subject.prior.key: subject for subject in plan.subjects if subject.prior is not None}
    flops = 0.0
    for uri, prior in plan.class_sets:
        owner = owners[prior.key]
        missing = len(prior.missing(images_present(uri, prior)))
        flops += missing * prior.num_inference_steps * _guided(owner, costs[owner.config.subject.name])
    return flops


def _guided(plan: Plan, cost: StepCost) -> float:
    """A sampling step of one image: with the prompt and without it. A pair is two images, too."""
    return cost.forward_flops / plan.config.train.micro_batch_size
