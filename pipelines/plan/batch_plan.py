"""The plan of a batch: its subjects, its number of lanes, and the reason for it."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dreambooth.amounts import counted
from dreambooth.config.settings import ClusterConfig, config_hash
from dreambooth.errors import InputError
from dreambooth.sampling.class_images import PriorPlan
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.describe import fewer_workers
from pipelines.plan.host_memory import check_host_memory, describe_host_memory, lanes_in_memory
from pipelines.plan.lanes_per_gpu import choose_lanes_per_gpu, describe_sharing
from pipelines.plan.run_plan import Plan
from pipelines.stages.evaluation_task import meant_encoder
from pipelines.stages.prior_stage import images_present
from pipelines.storage.files import join


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Many subjects, all checked. `uri` is the batch's own folder, `key` identifies the request.

    `lanes_per_gpu` is the number of lanes that share a GPU.
    """

    name: str
    uri: str
    key: str
    subjects: tuple[Plan, ...]
    lanes: int
    cluster: ClusterConfig
    use_gpu: bool
    resources: Resources
    lanes_per_gpu: int = 1

    @property
    def class_sets(self) -> tuple[tuple[str, PriorPlan], ...]:
        """The shared sets of class images: (address, plan), each once, at the largest requested size."""
        sets: dict[str, tuple[str, PriorPlan]] = {}
        for plan in self.subjects:
            if plan.prior is not None:
                known = sets.get(plan.prior.key)
                if known is None or known[1].count < plan.prior.count:
                    sets[plan.prior.key] = (plan.config.prior_uri, plan.prior)
        return tuple(sets.values())


def make_batch_plan(name: str, plans: Sequence[Plan], resources: Resources) -> BatchPlan:
    """Choose the lanes. Raises InputError if none fits the cluster, or subjects want different workers."""
    first = plans[0].config
    for plan in plans:
        if plan.config.cluster != first.cluster or plan.engine != plans[0].engine or plan.config.zero != first.zero:
            raise InputError(
                f"{plan.config.subject.name} needs other workers than {first.subject.name} "
                f"(cluster, zero or engine differ), but all lanes are alike; give these settings for the whole batch"
            )
    encoders = dict.fromkeys(meant_encoder(plan.config) for plan in plans if plan.config.evaluation.enabled)
    if len(encoders) > 1:
        raise InputError(
            f"by default subjects of these base models would be measured by other image encoders "
            f"({', '.join(encoders)}), which can't be compared; name one for the whole batch: "
            f"evaluation.image_encoder={next(iter(encoders))}"
        )
    resources.check(first.cluster)
    use_gpu = plans[0].use_gpu
    per_lane = first.cluster.num_workers * (1 if use_gpu else first.cluster.cpus_per_worker)
    room = max(1, (resources.gpus if use_gpu else resources.cpus) // per_lane)  # a lane may begin with fewer workers
    shared = choose_lanes_per_gpu(plans, resources)
    if shared > 1:  # also of the CPUs, as a lane takes some
        room = max(room, min(room * shared, resources.cpus // first.cluster.cpus_per_worker))
    asked = first.cluster.lanes
    if asked is not None and asked > room:
        each = f"{per_lane} {'GPUs' if use_gpu else 'CPUs'} each" if shared == 1 else f"{shared} on a GPU"
        raise InputError(
            f"cluster.lanes is {asked}, but the cluster has room for {room} of {each}; ask for fewer, or leave it out"
        )
    lanes = min(asked or room, len(plans))
    if asked is None:
        lanes = lanes_in_memory(plans, resources.node_bytes, lanes)
    for plan in plans:
        check_host_memory(plan, resources.node_bytes, lanes=lanes)
    return BatchPlan(
        name=name,
        uri=join(first.storage.root, "batches", name),
        key=config_hash(*sorted(plan.key for plan in plans)),
        subjects=tuple(plans),
        lanes=lanes,
        cluster=first.cluster,
        use_gpu=use_gpu,
        resources=resources,
        lanes_per_gpu=min(shared, math.ceil(lanes / resources.gpus)) if use_gpu else 1,
    )


def describe_batch(plan: BatchPlan) -> list[tuple[str, str]]:
    """The plan as (what, value) rows."""
    first, device = plan.subjects[0], "GPU" if plan.use_gpu else "CPU"
    workers, shared = plan.cluster.num_workers, plan.lanes_per_gpu
    each = 1 if plan.use_gpu else plan.cluster.cpus_per_worker
    total = plan.resources.gpus if plan.use_gpu else plan.resources.cpus
    takes = _part(workers * each, shared)
    why = "as asked" if plan.cluster.lanes else f"{total} {device}s, and a subject takes {takes}"
    if not plan.cluster.lanes and plan.lanes == len(plan.subjects):
        why = "no more than subjects"
    elif not plan.cluster.lanes and plan.lanes < total // (workers * each):
        why = "as many as main memory has room for"
    why += f", {shared} on each GPU" if shared > 1 else ""
    engine = f"DeepSpeed ZeRO-{first.config.zero.stage}" if first.engine == "deepspeed" else "PyTorch"
    stages = [stage for subject in plan.subjects for stage in subject.stages]
    largest = max(stages, key=lambda stage: stage.model_state_bytes)
    steps = sum(stage.config.train.max_train_steps for stage in stages)
    roots = dict.fromkeys(subject.config.storage.root for subject in plan.subjects)
    return [
        ("batch", f"{plan.name}: {counted(len(plan.subjects), 'subject')} of {_count_classes(plan)}"),
        *_bases(plan),
        ("workers", f"{workers} x {_part(each, shared)} {device} a subject{fewer_workers(plan.cluster)}, {engine}"),
        ("lanes", f"{plan.lanes} ({why})"),
        ("memory", f"{largest.model_state_bytes / 2**20:.0f} MiB a worker of weights, gradients and optimizer"),
        describe_host_memory(plan.subjects, plan.resources.node_bytes, lanes=plan.lanes),
        *describe_sharing(plan.subjects, shared, plan.resources),
        ("class images", _class_images(plan)),
        ("steps", f"{steps} in all, {steps // plan.lanes} a lane"),
        ("writes to", f"{', '.join(roots)}, the batch's own files to {plan.uri}"),
    ]


def _part(devices: int, shared: int) -> str:
    return str(devices) if shared == 1 else f"1/{shared}"


def _bases(plan: BatchPlan) -> list[tuple[str, str]]:
    """A row for every base model and second stage, with its number of subjects if there are several."""
    rows = []
    for what, stages in (
        ("base model", plan.subjects),
        ("second stage", [one.second for one in plan.subjects if one.second is not None]),
    ):
        subjects = Counter((one.config.base_model, one.base.hash) for one in stages)
        several = subjects.total() < len(plan.subjects) or len(subjects) > 1
        rows += [
            (what, f"{address}, hash {base_hash}{': ' + counted(count, 'subject') if several else ''}")
            for (address, base_hash), count in subjects.items()
        ]
    return rows


def _count_classes(plan: BatchPlan) -> str:
    return counted(len({subject.config.subject.class_noun for subject in plan.subjects}), "class", "classes")


def _class_images(plan: BatchPlan) -> str:
    if not plan.class_sets:
        return "none"
    missing = sum(len(prior.missing(images_present(uri, prior))) for uri, prior in plan.class_sets)
    there = sum(prior.count for _, prior in plan.class_sets) - missing
    sets = counted(len(plan.class_sets), "set")
    if not missing:
        return f"{sets}, {there:,} made"
    return f"{sets}, {counted(missing, 'image')} to make{f', {there:,} made' if there else ''}"
