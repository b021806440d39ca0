"""Render the KubeRay manifests of a run or batch, sized by its plan.

For KubeRay 1.7: a RayCluster of equal pods, enough for lanes times workers, each with the plan's GPUs, CPUs and memory.
A RayJob has such a cluster, the command and its configuration, and deletes the cluster at the end. Namespace, secrets,
settings and queue are in infra/kubernetes. The same configuration gives the same manifests, byte for byte.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, Template

from dreambooth.errors import InputError
from pipelines.cluster.certificates import tls_environment
from pipelines.plan.host_memory import LIBRARIES_BYTES, host_phases
from pipelines.plan.run_plan import Plan

Manifest = dict[str, Any]

LONGEST_NAME = 47
"""KubeRay's longest name of a RayJob; a RayCluster's may be six longer."""

_CONFIG_FOLDER = "/etc/dreambooth"
_LARGEST_CONFIG = 1 << 20  # etcd's limit for one object is 1.5 MiB
_GPU_NODE_CPUS = 4  # per GPU: reading images, sampling and uploads beside training
_PROCESS_BYTES = 2 << 30  # of a worker without its model: Python, torch, Ray, and batches in flight
_SHARED_MEMORY_BYTES = 2 << 30

_TLS = "/tls"
GIVE_NOTICE = (
    "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod goes' "
    "--deadline-remaining-seconds 90; "
    "for second in $(seq 100); do grep -qs RayTrainWorker /proc/[0-9]*/cmdline || break; sleep 1; done"
)
"""Pre-stop command of a pod: drains the Ray node, so that training writes a checkpoint, and waits until it has left."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Settings of the cluster beside the plan."""

    image: str
    namespace: str = "dreambooth"
    queue: str | None = "dreambooth"
    retries: int = 2
    deadline_seconds: int = 24 * 3600
    gpus_per_node: int = 8


@dataclass(frozen=True, kw_only=True)
class WorkerPods:
    """A number of equal pods; a pod holds whole workers, and a lane's workers share as few pods as possible."""

    count: int
    workers_per_pod: int
    gpus: int
    cpus: int
    memory_bytes: int


def worker_pods(plan: Plan, *, lanes: int, gpus_per_node: int) -> WorkerPods:
    """The pods for `lanes` times the plan's workers."""
    cluster = plan.config.cluster
    per_pod = max(n for n in range(1, gpus_per_node + 1) if cluster.num_workers % n == 0) if plan.use_gpu else 1
    asked = cluster.lanes_per_gpu
    shared = asked if plan.use_gpu and cluster.num_workers == 1 and asked != "auto" else 1
    cpus_per_worker = max(cluster.cpus_per_worker, _GPU_NODE_CPUS) if plan.use_gpu else cluster.cpus_per_worker
    return WorkerPods(
        count=math.ceil(lanes * cluster.num_workers / (per_pod * shared)),
        workers_per_pod=per_pod * shared,
        gpus=per_pod if plan.use_gpu else 0,
        cpus=per_pod * shared * cpus_per_worker,
        memory_bytes=per_pod * shared * host_bytes(plan) + _SHARED_MEMORY_BYTES,
    )


def host_bytes(plan: Plan) -> int:
    """Main memory of one worker, whichever it is of its lane: room for the process, and the largest phase.

    On a CPU also activations, of about the size of model states.
    """
    activations = 0 if plan.use_gpu else max(stage.model_state_bytes for stage in plan.stages)
    largest = max(held.each + held.first for held in host_phases(plan)) - LIBRARIES_BYTES
    return _PROCESS_BYTES + largest + activations


def ray_cluster(name: str, plans: Sequence[Plan], *, lanes: int, placement: Placement) -> Manifest:
    """A lasting RayCluster that scales between no workers and the plans' need."""
    name = _name(name)
    metadata = _metadata(name, plans, placement, queued=False)
    [manifest] = _filled(plans, lanes, placement, kind="RayCluster", name=name, metadata=metadata)
    return manifest


def ray_job(
    name: str,
    arguments: Sequence[str],
    files: Mapping[str, str],
    plans: Sequence[Plan],
    *,
    lanes: int,
    placement: Placement,
) -> list[Manifest]:
    """A RayJob with a cluster of its own, after a ConfigMap of the files among its arguments.

    `arguments` are those of `dreambooth`, files by their names in `files`. The cluster starts with all its pods, so a
    queue can admit it as a whole. Raises InputError for files too large for Kubernetes.
    """
    name = _name(name)
    if (size := sum(len(content.encode()) for content in files.values())) > _LARGEST_CONFIG:
        raise InputError(
            f"the configuration has {size} bytes, and Kubernetes takes {_LARGEST_CONFIG}; put the table where the "
            f"cluster can read it (s3://…) and give its address"
        )
    words = [f"{_CONFIG_FOLDER}/{word}" if word in files else word for word in arguments]
    return _filled(
        plans,
        lanes,
        placement,
        kind="RayJob",
        name=name,
        metadata=_metadata(name, plans, placement, queued=True),
        files=dict(files),
        entrypoint=shlex.join(["dreambooth", *words, "--set", "cluster.address=auto"]),
    )


def to_yaml(manifests: Sequence[Manifest]) -> str:
    """Readable YAML of manifests: no anchors, files as literal blocks."""
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _filled(plans: Sequence[Plan], lanes: int, placement: Placement, **context: Any) -> list[Manifest]:
    """The template's manifests, with pods sized for the largest plan."""
    import ray

    largest = max(plans, key=host_bytes)
    pods = worker_pods(largest, lanes=lanes, gpus_per_node=placement.gpus_per_node)
    text = _template().render(
        **asdict(placement),
        **context,
        pods=pods,
        memory=_gibibytes(pods.memory_bytes),
        shared_memory=_gibibytes(_SHARED_MEMORY_BYTES),
        ray_version=ray.__version__,
        tls=_TLS,
        tls_environment=tls_environment(_TLS),
        config_folder=_CONFIG_FOLDER,
        give_notice=GIVE_NOTICE,
    )
    return list(yaml.safe_load_all(text))


@cache
def _template() -> Template:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # JSON is YAML, and its quoted strings stay strings.
    environment.filters["yaml"] = partial(json.dumps, ensure_ascii=False)
    return environment.from_string(Path(__file__).with_name("kuberay.yaml").read_text(encoding="utf-8"))


def _metadata(name: str, plans: Sequence[Plan], placement: Placement, *, queued: bool) -> Manifest:
    """Name, queue, and annotations for people: compare the GPU memory with the nodes'."""
    first, largest = plans[0], max(plans, key=lambda plan: plan.model_state_bytes)
    annotations = {
        "dreambooth/subjects": str(len(plans)),
        "dreambooth/steps": str(sum(plan.config.train.max_train_steps for plan in plans)),
        "dreambooth/workers-per-subject": str(first.config.cluster.num_workers),
        "dreambooth/engine": f"deepspeed, ZeRO-{first.config.zero.stage}" if first.engine == "deepspeed" else "torch",
        "dreambooth/model-state-per-worker": f"{largest.model_state_bytes / 2**30:.2f}Gi",
    }
    metadata: Manifest = {"name": name, "namespace": placement.namespace, "annotations": annotations}
    if queued and placement.queue is not None:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": placement.queue}
    return metadata


def _name(name: str) -> str:
    """`name` as KubeRay allows: a letter first, with room for its suffixes."""
    name = name if name[0].isalpha() else f"job-{name}"
    if len(name) <= LONGEST_NAME:
        return name
    stem, _, key = name.rpartition("-")
    return f"{stem[: LONGEST_NAME - len(key) - 1].rstrip('-')}-{key}"


def _gibibytes(count: int) -> str:
    return f"{math.ceil(count / 2**30)}Gi"
