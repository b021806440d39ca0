"""Main memory of a node: what every worker of a subject holds there, phase by phase, and whether the nodes have it.

Pure arithmetic, without a step's activations: what doesn't fit by this can't be run.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dreambooth.amounts import readable_bytes
from dreambooth.errors import InputError
from pipelines.plan.run_plan import Plan

LIBRARIES_BYTES = 512 << 20
"""Bytes of a process that has imported torch, diffusers and DeepSpeed, on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Main memory in a phase: bytes of every worker of a subject, and what the first one holds beside."""

    phase: str
    each: int
    first: int = 0

    def of(self, workers: int) -> int:
        """Bytes of all workers."""
        return workers * self.each + self.first


def host_phases(plan: Plan) -> list[Held]:
    """Main memory of the phases of all stages of a plan, in order."""
    kept = LIBRARIES_BYTES + sum(_kept(stage) for stage in plan.stages)
    phases, trained = list[Held](), 0  # the first worker's weights of a stage before
    for stage in plan.stages:
        for held in (_loading(stage), *_training(stage), _sampling(stage)):
            phases.append(replace(held, each=held.each + kept, first=held.first + trained))
        trained += _counts(stage)[0] * _kept_states(stage)
    return phases


def snapshot_bytes(plan: Plan) -> tuple[int, int]:
    """Copies of checkpoint files that every worker keeps for the writing thread, and the first one beside.

    Without the best weights, which are kept as they are.
    """
    train, workers, footprint = plan.config.train, plan.config.cluster.num_workers, plan.footprint
    if train.checkpoint_every >= train.max_train_steps and train.checkpoint_every_minutes is None:
        return 0, 0
    trained, moments = 4 * footprint.trained, int(footprint.moments or 0)
    average = trained if footprint.average else 0
    if plan.engine != "deepspeed":
        return 0, trained + moments + average
    frozen = 4 * footprint.frozen  # DeepSpeed writes it, too
    if plan.zero_stage == 0:
        return average, trained + frozen + moments
    shard = (trained + moments + average) // workers
    return (
        (shard, footprint.weight * footprint.trained + frozen)
        if plan.zero_stage < 3
        else (shard + frozen // workers, 0)
    )


def reads_slices(plan: Plan) -> bool:
    """Whether each worker loads its part of the trained weights alone."""
    return plan.engine == "deepspeed" and plan.zero_stage == 3


def check_host_memory(plan: Plan, nodes: Sequence[int], *, lanes: int = 1) -> None:
    """Raise InputError if so many lanes don't fit nodes with so many bytes of main memory; `nodes` may be unknown."""
    workers = _workers(plan)
    for held in host_phases(plan) if nodes else ():
        if not _fits(held, workers, lanes, nodes):
            raise InputError(_too_much(plan, held, workers, lanes, nodes))


def lanes_in_memory(plans: Sequence[Plan], nodes: Sequence[int], most: int) -> int:
    """The most lanes, up to `most`, that fit nodes with so many bytes of main memory; one at least."""
    phases = {(_workers(plan), held) for plan in plans for held in host_phases(plan)} if nodes else set()
    fitting = (
        lanes for lanes in range(most, 1, -1) if all(_fits(held, workers, lanes, nodes) for workers, held in phases)
    )
    return next(fitting, 1)


def describe_host_memory(plans: Sequence[Plan], nodes: Sequence[int], *, lanes: int = 1) -> tuple[str, str]:
    """Main memory of a lane in the phase with the most of it, as a (what, value) row."""
    phases = [(plan.config.cluster.num_workers, held) for plan in plans for held in host_phases(plan)]
    workers, held = max(phases, key=lambda one: one[1].of(one[0]))
    there = f"; {_of_nodes(nodes)}" if nodes else ""
    return "main memory", f"about {_of_workers(held, workers)}{_of_lanes(lanes)}, {held.phase}{there}"


def _workers(plan: Plan) -> int:
    """Fewest workers of a subject."""
    return plan.config.cluster.min_workers or plan.config.cluster.num_workers


def _counts(plan: Plan) -> tuple[int, int, int]:
    """Bytes in fp32 of what is trained or run at every step, of frozen text encoders, and of all components."""
    counts = plan.base.parameter_counts
    run = counts[plan.base.family.denoiser.folder] + sum(counts[folder] for folder in plan.run_text_encoders)
    encoders = sum(counts[folder] for folder in plan.base.text_encoders if folder not in plan.run_text_encoders)
    return 4 * run, 4 * encoders, 4 * sum(counts.values())


def _kept(plan: Plan) -> int:
    """What a worker keeps from one subject to the next: the base as loaded, and frozen text encoders."""
    run, encoders, _ = _counts(plan)
    return encoders + (0 if reads_slices(plan) else run)


def _loading(plan: Plan) -> Held:
    run, encoders, everything = _counts(plan)
    part = 0 if plan.use_gpu else run // plan.config.cluster.num_workers
    vae = everything - run - encoders
    if plan.footprint.weight == 4:
        return Held(phase="loading the model", each=vae + (part if reads_slices(plan) else run))
    # Rounded, with what masters are made from: of a model in memory its own values, until they are in the masters.
    return Held(phase="loading the model", each=vae + (part // 2 if reads_slices(plan) else run + run // 2 + part))


def _training(plan: Plan) -> list[Held]:
    """Steps with a snapshot for checkpoints, and gathering the weights on the first worker."""
    run, _, everything = _counts(plan)
    states = plan.model_state_bytes
    if plan.use_gpu:
        states = plan.footprint.host_bytes(plan.zero_stage, plan.config.cluster.num_workers)
    elif plan.prior is not None:
        states += everything  # the pipeline that has sampled class images
    each, first = snapshot_bytes(plan)
    first += run if plan.config.train.keep == "best" else 0
    if plan.config.evaluation.every is not None and not plan.use_gpu:
        first += everything + run  # the pipeline of scores, and its own weights aside
    gathered = run * _kept_states(plan)
    return [
        Held(phase="training, with a copy of the checkpoint that is written", each=states + each, first=first),
        Held(phase="gathering the trained weights", each=states + each, first=first + gathered),
    ]


def _sampling(plan: Plan) -> Held:
    """A pipeline on every worker, its own weights aside, and the trained ones as they are published."""
    run, _, everything = _counts(plan)
    published = run if plan.config.storage.dtype == "float32" else run // 2
    shared = published if plan.config.cluster.num_workers > 1 else 0
    pipeline = 0 if plan.use_gpu else everything + run
    cast = 0 if published == run else published
    return Held(phase="sampling and publishing", each=pipeline + shared, first=run * _kept_states(plan) + cast)


def _kept_states(plan: Plan) -> int:
    """Gathered copies of the trained weights: their average, and the last step's where they are kept."""
    return 2 if plan.config.train.keep_unaveraged else 1


def _fits(held: Held, workers: int, lanes: int, nodes: Sequence[int]) -> bool:
    """Whether there is a node for every worker: the first ones of all lanes first, each where most is free."""
    free = [-node for node in nodes]
    heapq.heapify(free)
    for size in [held.each + held.first] * lanes + [held.each] * (lanes * (workers - 1)):
        most = -heapq.heappop(free)
        if most < size:
            return False
        heapq.heappush(free, size - most)
    return True


def _too_much(plan: Plan, held: Held, workers: int, lanes: int, nodes: Sequence[int]) -> str:
    what = _of_workers(held, workers) + _of_lanes(lanes)
    cures: list[str] = []
    if lanes > 1:
        fewer = next((count for count in range(lanes - 1, 0, -1) if _fits(held, workers, count, nodes)), 0)
        cures = [f"cluster.lanes={fewer}"] if fewer else []
    if workers > 1 and not reads_slices(plan):
        cures.append("zero.stage=3, with which no worker loads the whole model")
    return (
        f"{held.phase} takes at least {what} of main memory, but {_of_nodes(nodes)}; "
        f"{', or '.join([*cures, 'fewer workers a machine, or machines with more memory'])}"
    )


def _of_workers(held: Held, workers: int) -> str:
    first = f" and {readable_bytes(held.first)} more on the first" if held.first else ""
    if workers == 1:
        return readable_bytes(held.of(1))
    return f"{readable_bytes(held.each)} on each of {workers} workers{first}"


def _of_lanes(lanes: int) -> str:
    return f" in each of {lanes} lanes" if lanes > 1 else ""


def _of_nodes(nodes: Sequence[int]) -> str:
    if len(nodes) == 1:
        return f"the machine has {readable_bytes(nodes[0])}"
    return f"the {len(nodes)} machines have {readable_bytes(sum(nodes))}, the largest {readable_bytes(max(nodes))}"
