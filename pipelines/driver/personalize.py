"""One subject, end to end: a batch of one with its own view.

MLflow and pages take seconds to import, so that happens while Ray starts.
"""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.errors import InputError
from pipelines.cluster.ray_cluster import Resources, local_resources, ray_cluster, ray_cluster_meanwhile
from pipelines.driver.clock import Clock
from pipelines.driver.console import RunConsole
from pipelines.driver.lock import locked
from pipelines.plan.batch_plan import BatchPlan
from pipelines.plan.describe import describe_plan
from pipelines.plan.destinations import check_destinations, check_servers
from pipelines.plan.host_memory import check_host_memory
from pipelines.plan.run_plan import Plan, make_plan
from pipelines.stages.evaluation_task import encoder_address
from pipelines.storage.files import exists, join
from pipelines.tasks import BankAddress

if TYPE_CHECKING:
    from pipelines.driver.summary import PersonalizeResult


def personalize(config: DreamBoothConfig, console: RunConsole | None = None) -> "PersonalizeResult":
    """Run one subject through every stage; the same call again does only what is missing.

    The first KeyboardInterrupt is raised after a checkpoint, the second at once. Raises InputError for invalid input
    before any work starts, and where another command is at work in the subject's folder; RuntimeError if the subject
    fails more often than allowed.
    """
    console, clock = console or RunConsole(), Clock()
    with ExitStack() as stack:
        resources = None
        if config.cluster.address is not None:
            with clock.stage("ray"):
                resources = stack.enter_context(ray_cluster(config.cluster))
        with clock.stage("check"):
            plan = checked_plan(config, resources)
        nodes = _nodes(resources)
        if exists(join(plan.config.run_uri, "summary.json")) and (result := _stored(plan, console, nodes)) is not None:
            return result
        encoder = encoder_of(plan, console)
        if resources is None:
            ready = stack.enter_context(ray_cluster_meanwhile(config.cluster))
            clock.begin("ray")
        from pipelines.driver.single import drive

        check_servers([plan], nodes=nodes)
        for warning in plan.warnings:
            console.warn(warning)
        console.table(describe_plan(plan))
        confirm = stack.enter_context(locked(plan.config.run_uri, say=console.line))
        if resources is None:
            console.line("starting Ray")
            resources = ready()
            clock.end("ray")
        confirm()
        return drive(plan, resources, encoder, console, clock)


def _stored(plan: Plan, console: RunConsole, nodes: int) -> "PersonalizeResult | None":
    from pipelines.driver.single import find_stored

    check_servers([plan], nodes=nodes)
    return find_stored(plan, console)


def checked_plan(config: DreamBoothConfig, resources: Resources | None = None, *, weights: bool = True) -> Plan:
    """The plan of a run, with all its requirements checked but MLflow's (`check_servers`).

    Without `weights` those of the base may be missing.
    """
    resources = resources or local_resources()
    plan = make_plan(config, resources, weights=weights)
    if plan.has_weights:  # else nothing will be written, and it is planned for other machines
        check_host_memory(plan, resources.node_bytes)
        check_destinations([plan], nodes=resources.nodes)
    return plan


def dry_run(config: DreamBoothConfig, console: RunConsole) -> Plan:
    """The plan of a run, with all its requirements checked; starts nothing. The base may lack its weights."""
    with ExitStack() as stack:
        joined = config.cluster.address is not None
        resources = stack.enter_context(ray_cluster(config.cluster)) if joined else None
        plan = checked_plan(config, resources, weights=False)
        encoder_of(plan, console)
        check_servers([plan], nodes=_nodes(resources))
        return plan


def _nodes(resources: Resources | None) -> int:
    return resources.nodes if resources is not None else 1


def check_batch_destinations(batch: BatchPlan) -> None:
    """Check that the results of many subjects can be written. Raises InputError if not."""
    check_destinations(batch.subjects, lanes=batch.lanes, nodes=batch.resources.nodes)
    check_servers(batch.subjects, nodes=batch.resources.nodes)


def encoder_of(plan: Plan, console: RunConsole) -> BankAddress | None:
    """What samples for the eye are measured with; None, with a warning, if unavailable."""
    if not plan.config.evaluation.enabled:
        return None
    try:
        return encoder_address(plan.config)
    except InputError as error:
        if plan.config.evaluation.image_encoder is not None:
            raise
        console.warn(f"similarities will not be measured: {error}")
        return None
