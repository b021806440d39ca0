"""Check that a run would work on this cluster: nodes, storage and tracking, with a cure for each fault.

A task pinned to each node gathers facts; plain functions here judge them.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dreambooth.amounts import counted
from dreambooth.config.settings import DreamBoothConfig
from dreambooth.errors import InputError
from pipelines.cluster.machine import MachineFault, faults
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.node_facts import PACKAGES, NodeFacts, ask_nodes, dashboard_answers
from pipelines.storage.files import absolute

_LEAST_DISK_BYTES = 20 << 30  # base model, temporary checkpoints, Ray's spilled objects
_LARGEST_SKEW_SECONDS = 2.0

State = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Result of a check; `cure` is the remedy unless it is ok."""

    check: str
    state: State
    found: str
    cure: str = ""


def examine(config: DreamBoothConfig) -> list[Finding]:
    """All findings about the joined cluster, in reading order."""
    root = absolute(config.storage.root)  # tasks run in folders of their own
    config = config.model_copy(update={"storage": config.storage.model_copy(update={"root": root})})
    nodes, silent = ask_nodes(config)
    machines = {node.node: node.faults for node in nodes} if config.cluster.address else {"here": faults()}
    findings = [_judge_silent(silent), judge_versions(nodes), judge_machines(machines), *judge_nodes(nodes, config)]
    findings.append(_try("tracking", lambda: probe_tracking(config)))
    if config.cluster.address is None:
        found = "Ray was started here for this, without a dashboard: nobody else reaches it"
        return [*findings, Finding(check="authentication", state="ok", found=found)]
    encrypted = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")  # Ray refuses other versions
    return [*findings, judge_auth(*dashboard_answers()), judge_encryption(len(nodes), encrypted)]


def judge_versions(nodes: Sequence[NodeFacts]) -> Finding:
    """Whether all nodes run the same versions."""
    differing = []
    for package in ("python", *PACKAGES):
        by_version: dict[str, list[str]] = {}
        for node in nodes:
            by_version.setdefault(node.versions[package], []).append(node.node)
        if len(by_version) > 1 or "none" in by_version:
            differing.append(f"{package}: " + ", ".join(f"{v} on {' '.join(n)}" for v, n in sorted(by_version.items())))
    if differing:
        cure = "install constraints.txt on every node, or start all from one image (infra/docker)"
        return Finding(check="versions", state="failure", found="; ".join(differing), cure=cure)
    first = nodes[0].versions
    shown = ", ".join(f"{name} {first[name]}" for name in ("python", "ray", "torch", "deepspeed"))
    return Finding(check="versions", state="ok", found=f"{shown}, the same on {_count(len(nodes), 'node')}")


def judge_nodes(nodes: Sequence[NodeFacts], config: DreamBoothConfig) -> list[Finding]:
    """Devices, disk, compiler, clock, storage and base of all nodes."""
    return [
        _judge_devices(nodes, config),
        _worst(
            "disk",
            nodes,
            lambda node: node.free_disk_bytes >= _LEAST_DISK_BYTES,
            lambda node: f"{_gibibytes(node.free_disk_bytes)} free",
            f"free some, or point TMPDIR to a disk with {_gibibytes(_LEAST_DISK_BYTES)}",
            state="warning",
        ),
        _judge_compiler(nodes),
        _worst(
            "clock",
            nodes,
            lambda node: abs(node.skew_seconds) <= _LARGEST_SKEW_SECONDS,
            lambda node: f"{node.skew_seconds:+.1f} s",
            "run NTP (chrony) on every node: S3 refuses signatures of a wrong time, and a batch compares times",
        ),
        _worst(
            "storage",
            nodes,
            lambda node: node.storage_error is None,
            lambda node: node.storage_error or f"{config.storage.root} was written, read and cleared",
            "give every node the credentials and the address (docs/object-store.md)",
        ),
        _worst(
            "base model",
            nodes,
            lambda node: node.base_error is None,
            lambda node: node.base_error or f"{config.base_model} loads in {node.base_load_seconds:.1f} s",
            "give an address that every node reaches, or copy it to all",
        ),
    ]


def judge_machines(machines: Mapping[str, Sequence[MachineFault]]) -> Finding:
    """Faults of homes, folders, shared memory and loopbacks, by the machine's name."""
    found = "; ".join(f"{name}: {fault.found}" for name, its_faults in machines.items() for fault in its_faults)
    if not found:
        return Finding(check="machine", state="ok", found="home, folders, shared memory and loopback are fine")
    every = [fault for its_faults in machines.values() for fault in its_faults]
    state: State = "failure" if any(fault.stops for fault in every) else "warning"
    return Finding(check="machine", state=state, found=found, cure="; ".join(dict.fromkeys(f.cure for f in every)))


def judge_auth(without_token: int | None, host: str) -> Finding:
    """Whether the dashboard lets anybody run code: `without_token` is its answer to a call without a token."""
    if without_token in (401, 403):
        return Finding(check="authentication", state="ok", found=f"a call without a token gets {without_token}")
    if without_token is None:
        found, cure = f"the dashboard at {host} doesn't answer", "start Ray with its dashboard: jobs need it"
        return Finding(check="authentication", state="warning", found=found, cure=cure)
    local = host.split(":", maxsplit=1)[0] in ("127.0.0.1", "localhost")
    found = f"whoever reaches {host} may run code: a call without a token gets {without_token}"
    cure = "ray get-auth-token --generate, and RAY_AUTH_MODE=token on every node"
    return Finding(check="authentication", state="warning" if local else "failure", found=found, cure=cure)


def judge_encryption(nodes: int, encrypted: bool) -> Finding:
    """Whether others on the network can read the traffic between Ray's nodes, including the token."""
    if encrypted:
        return Finding(check="encryption", state="ok", found="Ray's nodes and drivers use TLS")
    if nodes == 1:
        return Finding(check="encryption", state="ok", found="one node: Ray's traffic stays on the machine")
    certificates = "certificates (python -m pipelines.cluster.certificates)"
    cure = f"RAY_USE_TLS=1 and {certificates}, unless the network is yours alone"
    return Finding(check="encryption", state="warning", found="Ray's nodes communicate without TLS", cure=cure)


def probe_tracking(config: DreamBoothConfig) -> str:
    """Write a run and a registered model to a server, read them, delete them; only look at a database's file.

    Raises InputError for what is refused.
    """
    import secrets

    from dreambooth.config.addresses import shown
    from pipelines.tracking.client import connect, quietly
    from pipelines.tracking.database import database_path
    from pipelines.tracking.runs import check_tracking

    uri = check_tracking(config.tracking)
    if (path := database_path(uri)) is not None:
        return f"{shown(uri)} {'can be written' if path.exists() else 'is made by the first run'}"
    client, name = connect(uri), f"dreambooth-doctor-{secrets.token_hex(4)}"
    with quietly():
        experiment = client.get_experiment_by_name("dreambooth-doctor")
        experiment_id = experiment.experiment_id if experiment else client.create_experiment("dreambooth-doctor")
        run = client.create_run(experiment_id, run_name=name)
        client.log_metric(run.info.run_id, "probe", 1.0)
        if client.get_run(run.info.run_id).data.metrics != {"probe": 1.0}:
            raise InputError(f"MLflow at {shown(uri)} gives back other metrics than were written")
        client.delete_run(run.info.run_id)
        if config.tracking.register_model:
            client.create_registered_model(name)
            client.delete_registered_model(name)
    return f"{shown(uri)} takes runs{' and models' if config.tracking.register_model else ''}"


def _judge_silent(silent: Sequence[str]) -> Finding:
    if silent:
        cure = "see the node's logs (ray logs); it may lack this project's code or its packages"
        return Finding(check="nodes", state="failure", found="; ".join(silent), cure=cure)
    return Finding(check="nodes", state="ok", found="all answer")


def _judge_devices(nodes: Sequence[NodeFacts], config: DreamBoothConfig) -> Finding:
    gpus = [f"{name} {_gibibytes(size)}" for node in nodes for name, size in node.gpus]
    cpus = sum(node.cpus for node in nodes)
    least = min(node.memory_bytes for node in nodes)
    kinds = ", ".join(f"{gpus.count(kind)} x {kind}" for kind in dict.fromkeys(gpus))
    found = f"{kinds or 'no GPU'}; {counted(round(cpus), 'CPU')}, {_gibibytes(least)} of memory a node at least"
    try:
        largest = int(max(node.cpus for node in nodes))
        Resources(cpus=int(cpus), gpus=len(gpus), nodes=len(nodes), largest_node_cpus=largest).check(config.cluster)
    except InputError as error:
        return Finding(check="devices", state="failure", found=found, cure=str(error))
    return Finding(check="devices", state="ok", found=found)


def _judge_compiler(nodes: Sequence[NodeFacts]) -> Finding:
    without = [node.node for node in nodes if node.compiler is None and not node.built_ops]
    if without:
        # The optimizer is torch's, so nothing is compiled.
        found = f"none on {' '.join(without)}; the pipeline compiles nothing"
        return Finding(check="compiler", state="ok", found=found)
    built = sorted({op for node in nodes for op in node.built_ops})
    return Finding(check="compiler", state="ok", found=f"there; DeepSpeed ops built: {', '.join(built) or 'none'}")


def _worst(
    check: str,
    nodes: Sequence[NodeFacts],
    good: Callable[[NodeFacts], bool],
    say: Callable[[NodeFacts], str],
    cure: str,
    *,
    state: State = "failure",
) -> Finding:
    """One finding for all nodes: the failing ones, or the first if none fails."""
    bad = [node for node in nodes if not good(node)]
    if bad:
        found = "; ".join(f"{node.node}: {say(node)}" for node in bad)
        return Finding(check=check, state=state, found=found, cure=cure)
    return Finding(check=check, state="ok", found=say(nodes[0]))


def _try(check: str, probe: Callable[[], str]) -> Finding:
    try:
        return Finding(check=check, state="ok", found=probe())
    except Exception as error:  # noqa: BLE001 - MLflow's, the database's, the network's
        found = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cure = "look at tracking.uri, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return Finding(check=check, state="failure", found=found, cure=cure)


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.0f} GiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
