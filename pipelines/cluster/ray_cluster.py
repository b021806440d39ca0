"""Start Ray here or join a cluster, and read its resources."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dreambooth.amounts import counted
from dreambooth.config.settings import ClusterConfig
from dreambooth.errors import InputError
from dreambooth.reach import within
from pipelines.cluster.address import about_token, prove_cluster
from pipelines.cluster.environment import environment
from pipelines.cluster.gpus import count_gpus, smallest_gpu_bytes
from pipelines.cluster.machine import check_loopback, ray_folder
from pipelines.cluster.nodes import alive_nodes
from pipelines.cluster.patience import patient_start
from pipelines.cluster.preemption import WATCHER_SWITCH
from pipelines.cluster.sentence import sentence

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "PYTHONWARNINGS": "ignore",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
# How soon Ray Train's controller notices a lost or finished worker.
_TRAIN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
_ROOM, _ROOM_SECONDS, _ELASTIC_ROOM_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "180", "30"
"""Seconds that Ray Train waits for room for all workers before asking again. Elastic groups wait less: right after
losing a node Ray still counts its resources, and only a new request finds that fewer workers fit."""
_HERE = {
    # Nobody announces preemption of this machine: saves a process per worker group.
    WATCHER_SWITCH: "0",
}
_ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296"
WORKER_ENVIRONMENT = {"env_vars": {"GLIBC_TUNABLES": _ALLOCATOR}}
"""Environment of training processes: keep freed memory. Every step allocates the same tensors again, and zeroing
returned pages costs a fourteenth of the miniature's step on a CPU."""
_OBJECT_STORE_BYTES = 512 << 20
_JOIN_SECONDS = 60.0
_WITHOUT_BF16 = re.compile(
    r"(?<![A-Z0-9])([KM]\d+|P4|P6|P40|P100|V100\w*|T4|GTX|TITAN|RTX[- ]20\d\d|Quadro)(?![A-Z0-9])"
)
"""Names of NVIDIA GPUs before Ampere, where bf16 is emulated."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Total resources of a cluster, names of its GPUs, and the CPUs of its largest node (None: it has one node).

    `gpu_bytes` is the memory of its smallest GPU, None if that isn't known; `node_bytes` is the main memory of every
    node, empty if that isn't.
    """

    cpus: int
    gpus: int
    nodes: int = 1
    largest_node_cpus: int | None = None
    gpu_types: tuple[str, ...] = ()
    gpu_bytes: int | None = None
    node_bytes: tuple[int, ...] = ()

    def check(self, config: ClusterConfig) -> None:
        """Raise InputError if one subject's workers don't fit; Ray would wait for ever."""
        setting = "num_workers" if config.min_workers is None else "min_workers"
        workers = config.min_workers or config.num_workers
        cpus, gpus = workers * config.cpus_per_worker, workers if self.use_gpu(config) else 0
        if cpus > self.cpus or gpus > self.gpus:
            raise InputError(
                f"cluster.{setting} is {workers}, which takes {counted(cpus, 'CPU')} and {counted(gpus, 'GPU')}, but "
                f"the cluster has {counted(self.cpus, 'CPU')} and {counted(self.gpus, 'GPU')}; ask for fewer workers "
                f"or a larger cluster"
            )
        if self.largest_node_cpus is not None and config.cpus_per_worker > self.largest_node_cpus:
            raise InputError(
                f"cluster.cpus_per_worker is {config.cpus_per_worker}, but the largest node has "
                f"{counted(self.largest_node_cpus, 'CPU')}; a worker can't be spread over nodes, so ask for fewer"
            )

    def use_gpu(self, config: ClusterConfig) -> bool:
        """Whether a worker gets a GPU."""
        return self.gpus > 0 if config.use_gpu == "auto" else config.use_gpu

    @property
    def gpus_have_bf16(self) -> bool:
        """Whether no GPU is known to lack bf16, since a worker may get any of them."""
        return not any(_WITHOUT_BF16.search(name) for name in self.gpu_types)


def worker_group(config: ClusterConfig, *, use_gpu: bool, lanes_per_gpu: int = 1) -> Any:
    """Ray Train's configuration of a worker group; a range resizes it as room allows.

    Of `lanes_per_gpu` groups each takes a share of a GPU.
    """
    import ray.train

    fewest, most = config.min_workers, config.num_workers
    # mypy sees the ScalingConfig of Ray Train V1, the interpreter V2's.
    return ray.train.ScalingConfig(  # type: ignore[call-arg]
        num_workers=most if fewest in (None, most) else (fewest, most),  # type: ignore[arg-type]
        elastic_resize_monitor_interval_s=config.resize_seconds,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": _share(lanes_per_gpu)} if use_gpu else {}),
    )


def _share(lanes_per_gpu: int) -> float:
    """The share of a GPU that Ray counts for a lane, in its ten-thousandths: all of them have to fit."""
    return 1 if lanes_per_gpu == 1 else 10_000 // lanes_per_gpu / 10_000


def local_resources() -> Resources:
    """Resources of this machine for a Ray started here."""
    gpus = count_gpus()
    memory = smallest_gpu_bytes() if gpus else None
    return Resources(
        cpus=usable_cpus(),
        gpus=gpus,
        gpu_types=_local_gpu_types(),
        gpu_bytes=memory,
        node_bytes=(usable_memory(),),
    )


def _local_gpu_types() -> tuple[str, ...]:
    """Names of this machine's NVIDIA GPUs, from the driver: asking CUDA would take memory of each."""
    about = (path.read_text() for path in Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return tuple(sorted({found[1].strip() for text in about if (found := re.search(r"(?m)^Model:(.+)$", text))}))


def usable_cpus() -> int:
    """CPUs this process may use: by affinity, and by the quota of a container (cgroup v2)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cpus, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return cpus


def usable_memory() -> int:
    """Bytes of main memory that this process may use: the machine's, or a container's limit (cgroup v2)."""
    import psutil

    total = psutil.virtual_memory().total
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return total


def _node_bytes(config: ClusterConfig, nodes: list[dict[str, float]]) -> tuple[int, ...]:
    """Main memory of every node: what Ray counted when it started there, for tasks and for its objects."""
    if config.address is None:
        return (usable_memory(),)
    return tuple(int(node.get("memory", 0) + node.get("object_store_memory", 0)) for node in nodes)


@contextmanager
def ray_cluster(config: ClusterConfig) -> Iterator[Resources]:
    """Start Ray here, or join the cluster at `config.address`, within this context.

    A Ray already started by the caller is used as it is. Raises InputError if there is none at the address.
    """
    if config.address is None and "ray" not in sys.modules:
        # Ray reads it once, at import; changed later, this process would differ from the ones it starts.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    room = {_ROOM: _ROOM_SECONDS if config.min_workers is None else _ELASTIC_ROOM_SECONDS}
    for name, value in (_QUIET | _TRAIN | room).items():
        os.environ.setdefault(name, value)
    import ray

    started = not ray.is_initialized()
    if started:
        before = signal.getsignal(signal.SIGTERM)
        _connect(config)
        _handle_sigterm(before)
    try:
        total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        nodes = [node["Resources"] for node in alive_nodes()]
        yield Resources(
            cpus=int(total.get("CPU", 0)),
            gpus=int(total.get("GPU", 0)),
            nodes=len(nodes),
            largest_node_cpus=int(max(node.get("CPU", 0) for node in nodes)),
            gpu_types=tuple(sorted(name.partition(":")[2] for name in total if name.startswith("accelerator_type:"))),
            gpu_bytes=_gpu_bytes(config) if total.get("GPU") else None,
            node_bytes=_node_bytes(config, nodes),
        )
    finally:
        if started:
            ray.shutdown()


def _gpu_bytes(config: ClusterConfig) -> int | None:
    """Memory of the smallest GPU. Nodes are asked only where lanes are to share one, as it takes seconds."""
    if config.address is None:
        return smallest_gpu_bytes()
    if config.lanes_per_gpu in ("auto", 1):
        return None
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(smallest_gpu_bytes)
    nodes = [node for node in alive_nodes() if node["Resources"].get("GPU")]
    pinned = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    try:
        answers = ray.get([ask.options(scheduling_strategy=node).remote() for node in pinned], timeout=_JOIN_SECONDS)
    except Exception:  # noqa: BLE001 - a lost or busy node: the plan says that the memory isn't known
        return None
    known = [memory for memory in answers if memory is not None]
    return min(known) if known and len(known) == len(answers) else None


@contextmanager
def ray_cluster_meanwhile(config: ClusterConfig) -> Iterator[Callable[[], Resources]]:
    """`ray_cluster` started in the background; call the yielded function to wait for its resources."""
    with ThreadPoolExecutor(1, thread_name_prefix="ray") as pool, ExitStack() as stack:
        before = signal.getsignal(signal.SIGTERM)
        starting = pool.submit(lambda: stack.enter_context(ray_cluster(config)))

        def started() -> Resources:
            resources = starting.result()
            _handle_sigterm(before)
            return resources

        try:
            yield started
        finally:
            wait([starting])


def _handle_sigterm(handler: Any) -> None:
    """Restore our SIGTERM handler, which Ray replaces by a stack trace; only the main thread can."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _connect(config: ClusterConfig) -> None:
    import logging

    import ray

    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address is None:
        here = local_resources()
        check_loopback()
        if (folder := ray_folder()) is not None:
            common["_temp_dir"] = folder
        began = time.monotonic()
        with environment(_HERE), patient_start():
            try:
                ray.init(
                    address="local",
                    num_cpus=here.cpus,
                    num_gpus=here.gpus,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    **common,
                )
            except Exception as error:  # Ray has no class for it
                if "timed out during startup" not in str(error):
                    raise
                seconds, load = time.monotonic() - began, os.getloadavg()[0]
                raise RuntimeError(
                    f"Ray did not start here within {seconds:.0f} seconds; the machine may be busy (load {load:.0f} on "
                    f"{here.cpus} CPUs) or short of memory; run the same command again when it is less busy"
                ) from error
        return
    address = prove_cluster(config.address)
    join = partial(ray.init, address=config.address, runtime_env={"env_vars": _QUIET}, **common)
    try:
        within(_JOIN_SECONDS, join)
    except (OSError, ValueError, RuntimeError) as error:
        if "AuthenticationError" in str(error.__cause__):  # Ray keeps only its text
            raise InputError(about_token(address)) from None
        reason = f"no answer in {_JOIN_SECONDS:.0f} seconds" if isinstance(error, TimeoutError) else sentence(error)
        raise InputError(
            f"the Ray cluster at {address} can't be joined: {reason}; look at 'ray status' there, or leave "
            f"cluster.address out to start Ray here"
        ) from None
