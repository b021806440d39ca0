"""Facts about every node of a cluster and its connections, gathered by a task pinned to each."""

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.errors import InputError
from pipelines.cluster.machine import MachineFault, faults
from pipelines.cluster.nodes import alive_nodes

PACKAGES = ("dreambooth", "ray", "torch", "deepspeed", "diffusers", "transformers", "mlflow", "safetensors")
_PATIENCE_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """Facts of a node, with its clock's distance from the driver's in seconds; errors are None if all is well."""

    node: str
    versions: Mapping[str, str]
    cpus: float
    memory_bytes: int
    gpus: tuple[tuple[str, int], ...]
    free_disk_bytes: int
    compiler: str | None
    built_ops: tuple[str, ...]
    skew_seconds: float
    storage_error: str | None
    base_error: str | None
    base_load_seconds: float
    faults: tuple[MachineFault, ...] = ()


def ask_nodes(config: DreamBoothConfig) -> tuple[list[NodeFacts], list[str]]:
    """(facts of answering nodes, faults of silent ones). Raises InputError if none answers."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0, max_retries=0)
    def clock() -> float:
        return time.time()

    asked = []
    alive = alive_nodes()
    for node in alive:
        pinned = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}
        asked.append(ray.remote(num_cpus=0, max_retries=0)(facts_of_this_node).options(**pinned).remote(config))
    ray.wait(asked, num_returns=len(asked), timeout=_PATIENCE_SECONDS)
    nodes, silent = [], []
    for node, answer in zip(alive, asked, strict=True):
        name = str(node["NodeManagerHostname"])
        pinned = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}
        try:
            facts = ray.get(answer, timeout=0.1)
            # A worker is up there now, so reading the clock doesn't include its start.
            before = time.time()
            there = ray.get(clock.options(**pinned).remote(), timeout=_PATIENCE_SECONDS)
            skew = there - (before + time.time()) / 2
        except Exception as error:  # noqa: BLE001 - lost, out of memory, without our code: all are findings
            silent.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[-1]}")
            continue
        nodes.append(NodeFacts(node=name, cpus=node["Resources"].get("CPU", 0), skew_seconds=skew, **facts))
    if not nodes:
        raise InputError(f"no node of the cluster answers: {'; '.join(silent)}")
    return nodes, silent


def facts_of_this_node(config: DreamBoothConfig) -> dict[str, Any]:
    """The fields of `NodeFacts` without name, CPUs and clock skew; `time` is this node's clock."""
    import psutil

    storage_error = _error(lambda: _check_storage(config))
    began = time.perf_counter()
    base_error = _error(lambda: _load_base(config))
    return {
        "versions": installed_versions(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus(),
        "free_disk_bytes": shutil.disk_usage(tempfile.gettempdir()).free,
        "compiler": shutil.which("c++") or shutil.which("g++"),
        "built_ops": _built_ops(),
        "storage_error": storage_error,
        "base_error": base_error,
        "base_load_seconds": time.perf_counter() - began,
        "faults": faults(working_folder=False),
    }


def installed_versions() -> dict[str, str]:
    """Versions of Python and of packages that must agree; "none" for missing ones."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            # The code may be uploaded with the job.
            versions[package] = _own_version() if package == "dreambooth" else "none"
    return versions


def _error(action: Callable[[], object]) -> str | None:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - any exception is the finding
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None


def _check_storage(config: DreamBoothConfig) -> None:
    from pipelines.storage.files import check_writable

    check_writable(config.storage.root)


def _load_base(config: DreamBoothConfig) -> None:
    from dreambooth.models.base_model import resolve_base_model
    from dreambooth.quiet import quiet
    from dreambooth.training.model import load_components

    quiet()
    load_components(resolve_base_model(config.base_model, config.revision).directory)
    if (second := config.second_stage) is not None:
        load_components(resolve_base_model(second.base_model, second.revision, scales_up=True).directory)


def gpus() -> tuple[tuple[str, int], ...]:
    """(name, bytes of memory) of every CUDA device of this machine."""
    import torch

    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return tuple((properties.name, properties.total_memory) for properties in found)


def _built_ops() -> tuple[str, ...]:
    """DeepSpeed's operations compiled at installation, read without importing it."""
    import runpy
    from importlib.util import find_spec

    spec = find_spec("deepspeed")
    path = Path(str(spec.origin)).with_name("git_version_info_installed.py") if spec else Path()
    if not path.is_file():
        return ()
    return tuple(sorted(op for op, built in runpy.run_path(str(path)).get("installed_ops", {}).items() if built))


def _own_version() -> str:
    from dreambooth import __version__

    return __version__


def dashboard_answers() -> tuple[int | None, str]:
    """(HTTP status of a call without a token, the dashboard's address)."""
    import urllib.error
    import urllib.request

    import ray

    host = str(ray._private.worker.get_dashboard_url() or "none")  # type: ignore[no-untyped-call]
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"http://{host}/api/jobs/", timeout=10
        ) as answer:
            return int(answer.status), host
    except urllib.error.HTTPError as error:
        return error.code, host
    except OSError:
        return None, host
