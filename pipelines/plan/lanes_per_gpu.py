"""How many lanes share a GPU, where one worker trains a subject.

By default one, unless earlier batches on GPUs of this kind have shown that several together make more steps per second.
As many as asked for are checked against the planned memory.
"""

import math
import re
from collections.abc import Mapping, Sequence

from dreambooth.amounts import readable_bytes
from dreambooth.errors import InputError
from pipelines.cluster.gpus import USABLE
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.memory import peak_bytes, sampling_peak
from pipelines.plan.pace import Pace, known_paces, pace_key
from pipelines.plan.run_plan import Plan

CONTEXT_BYTES = 512 << 20
"""Bytes that each process takes of a GPU: CUDA's context and the libraries' workspaces."""
_GAIN = 1.05
"""What several lanes have to make over one to be worth it: paces differ by a few per cent from day to day."""
_KIND = re.compile(r"(?<![A-Z0-9])[A-Z]{1,3}\d{1,4}[A-Z]?(?![A-Z0-9])")
"""Ray says A100 for what its driver calls NVIDIA A100-SXM4-80GB."""
_MOST = 8
"""Most lanes of a GPU whose paces are looked for."""


def choose_lanes_per_gpu(plans: Sequence[Plan], resources: Resources) -> int:
    """The number of lanes on each GPU.

    Raises InputError for a `cluster.lanes_per_gpu` that the workers can't have, or that doesn't fit a GPU's memory.
    """
    cluster, use_gpu = plans[0].config.cluster, plans[0].use_gpu
    asked = cluster.lanes_per_gpu
    alone = cluster.num_workers == 1 and use_gpu
    if asked == "auto":
        return _measured_best(plans, resources) if alone else 1
    if asked > 1 and not alone:
        why = "several workers of one subject can't share a GPU" if use_gpu else "the workers have no GPU"
        raise InputError(f"cluster.lanes_per_gpu is {asked}, but {why}; leave it out")
    if asked > 1 and resources.gpu_bytes is not None:
        _check_memory(plans, asked, resources.gpu_bytes)
    return asked


def lane_bytes(plans: Sequence[Plan]) -> int:
    """Bytes of GPU memory of a lane, whichever of the subjects it trains or samples.

    A captured step keeps its memory while samples are made; what sampling keeps is freed for training if need be.
    """
    peaks = {pace_key(stage): stage for plan in plans for stage in plan.stages}
    sampled = {
        (plan.base_hash, plan.config.images.resolution, plan.prior and plan.prior.recipe): plan for plan in plans
    }
    training, sampling = max(map(peak_bytes, peaks.values())), max(map(sampling_peak, sampled.values()))
    both = plans[0].config.train.graph == "auto"
    return CONTEXT_BYTES + (training + sampling if both else max(training, sampling))


def _check_memory(plans: Sequence[Plan], asked: int, gpu_bytes: int) -> None:
    each, usable = lane_bytes(plans), int(gpu_bytes * USABLE)
    if asked * each <= usable:
        return
    fit = usable // each
    cure = f"set it to {fit} or less" if fit > 1 else "leave it out"
    raise InputError(
        f"cluster.lanes_per_gpu is {asked}, which takes {asked} times {readable_bytes(each)}, but a GPU has "
        f"{readable_bytes(usable)} for them; {cure}, or try train.gradient_checkpointing or a smaller "
        f"train.micro_batch_size"
    )


def _measured_best(plans: Sequence[Plan], resources: Resources) -> int:
    """The number with the most steps per second of a GPU, by paces measured on GPUs of this kind alone."""
    known = {key: pace for key, pace in known_paces(plans[0].config.storage.root).items() if pace.gpu}
    if not known:
        return 1
    trained = [stage for plan in plans for stage in plan.stages if stage.config.train.max_train_steps]
    stages = {pace_key(stage): stage for stage in trained}
    rates = {number: _rate([*stages.values()], number, known, resources) for number in range(1, _MOST + 1)}
    fitting = [number for number, rate in rates.items() if rate and (number == 1 or _fits(plans, number, resources))]
    best = max(fitting, key=lambda number: rates[number], default=1)
    return best if rates[1] and rates[best] > _GAIN * rates[1] else 1


def _rate(stages: Sequence[Plan], number: int, known: Mapping[str, Pace], resources: Resources) -> float:
    """Steps per second that so many lanes on a GPU make together, over all stages; 0 if not measured for each."""
    found = [known.get(pace_key(stage, lanes_per_gpu=number)) for stage in stages]
    paces = [pace.steps_per_second for pace in found if pace is not None and pace.gpu == gpu_kind(resources)]
    return number / math.fsum(1 / pace for pace in paces) if len(paces) == len(found) else 0.0


def _fits(plans: Sequence[Plan], number: int, resources: Resources) -> bool:
    # Where the memory isn't known, they have run before.
    return resources.gpu_bytes is None or number * lane_bytes(plans) <= resources.gpu_bytes * USABLE


def gpu_kind(resources: Resources) -> str:
    """The kind of the cluster's GPUs, such as A100; empty if that isn't known, or there are several."""
    kinds = {found[0] if (found := _KIND.search(name)) else name for name in resources.gpu_types}
    return kinds.pop() if len(kinds) == 1 else ""


def describe_sharing(plans: Sequence[Plan], number: int, resources: Resources) -> list[tuple[str, str]]:
    """A (what, value) row about the memory of lanes that share a GPU; none where each has its own."""
    if number == 1:
        return []
    there = "its memory isn't known" if resources.gpu_bytes is None else f"it has {readable_bytes(resources.gpu_bytes)}"
    return [("each GPU", f"{number} lanes, about {readable_bytes(lane_bytes(plans))} each; {there}")]
