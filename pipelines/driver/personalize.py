"""One subject, end to end, on one screen: a batch of one, with a view of its own."""

import secrets
from contextlib import ExitStack

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.errors import InputError
from pipelines.cluster.ray_cluster import Resources, ray_cluster, ray_cluster_meanwhile
from pipelines.driver.batch import queued_subjects
from pipelines.driver.clock import Clock
from pipelines.driver.conclude import conclude_stored, finish, track_plan
from pipelines.driver.console import RunConsole
from pipelines.driver.driving import Driver, until_ended
from pipelines.driver.follow import Curves
from pipelines.driver.lanes import Lanes
from pipelines.driver.run_view import RunView
from pipelines.driver.summary import PersonalizeResult, is_tracked, stored_result
from pipelines.driver.train_stage import find_result
from pipelines.plan.batch_plan import BatchPlan
from pipelines.plan.describe import describe_plan
from pipelines.plan.destinations import check_destinations
from pipelines.plan.run_plan import Plan, make_plan
from pipelines.queue.queue_actor import start_queue
from pipelines.stages.evaluate_stage import image_encoder
from pipelines.stages.evaluation_store import load_evaluation
from pipelines.storage.files import join, remove
from pipelines.tracking.tracked_run import TrackedRun


def personalize(config: DreamBoothConfig, console: RunConsole | None = None) -> PersonalizeResult:
    """Run one subject through every stage; the same call again does only what is missing.

    The first KeyboardInterrupt is raised after a checkpoint, the second at once. Raises InputError for invalid input
    before any work starts, RuntimeError if the subject fails more often than allowed.
    """
    console, clock = console or RunConsole(), Clock()
    with ExitStack() as stack:
        resources = None
        if config.cluster.address is not None:
            with clock.stage("ray"):
                resources = stack.enter_context(ray_cluster(config.cluster))
        with clock.stage("check"):
            plan = checked_plan(config, resources)
        if (stored := stored_result(plan)) is not None:
            if is_tracked(plan, stored):
                console.line(f"nothing to do: {plan.config.run_uri} holds the result of this configuration")
                return stored
            console.line(f"{plan.config.run_uri} holds the result of this configuration; MLflow gets what it lacks")
            if (result := conclude_stored(plan, earlier=stored.summary, say=console.warn)) is not None:
                return result
        encoder = encoder_of(plan, console)
        if resources is None:
            ready = stack.enter_context(ray_cluster_meanwhile(config.cluster))
        for warning in plan.warnings:
            console.warn(warning)
        console.table(describe_plan(plan))
        if resources is None:
            with clock.stage("ray"):
                resources = ready()
        return _drive(plan, resources, encoder, console, clock)


def _drive(
    plan: Plan, resources: Resources, encoder: str | None, console: RunConsole, clock: Clock
) -> PersonalizeResult:
    """Drive a batch of one, whose queue and lane leave nothing behind."""
    import ray

    work = BatchPlan(
        name=plan.config.subject.name,
        uri=join(plan.config.run_uri, "work"),
        key=plan.key,
        subjects=(plan,),
        lanes=1,
        cluster=plan.config.cluster,
        use_gpu=plan.use_gpu,
        resources=resources,
    )
    remove(work.uri)  # of a driver that was killed
    name = secrets.token_hex(4)
    queue = start_queue(work.uri, name, queued_subjects(work), retries=plan.config.cluster.max_failures)
    lanes = Lanes(work, name, queue, encoder)
    clock.begin("train")
    lanes.start()
    results: list[PersonalizeResult] = []
    with (
        track_plan(plan, say=console.warn) as run,
        RunView(console, plan.config.train.max_train_steps) as view,
        Curves(lambda one: run) as curves,
    ):

        def conclude(one: Plan) -> str:
            clock.take_lane(view.milestones, protocol=one.protocol is not None)
            results.append(_finish(one, run, view, clock))
            return ""

        interrupted = Driver(work, queue, lanes, view, curves, conclude).drive()
        [record] = ray.get(queue.records.remote())
        if not interrupted:
            until_ended(lanes)
        ray.kill(queue)
        remove(work.uri)
        if interrupted and not results:
            raise KeyboardInterrupt
        if not results:
            raise RuntimeError(f"{record.name} failed: {record.reason}")
        return results[-1]


def _finish(plan: Plan, run: TrackedRun, view: RunView, clock: Clock) -> PersonalizeResult:
    trained = find_result(plan)
    if trained is None:
        raise RuntimeError(f"training ended, but there is no model at {join(plan.config.run_uri, 'model')}")
    view.line(f"published and verified: {trained.model.uri}")
    evaluation = load_evaluation(plan.config.run_uri, plan.key) if plan.config.evaluation.enabled else None
    return finish(plan, trained, evaluation, run, clock.seconds, clock.startup(view.milestones))


def checked_plan(config: DreamBoothConfig, resources: Resources | None = None, *, weights: bool = True) -> Plan:
    """The plan of a run, with all its requirements checked; without `weights` those of the base may be missing."""
    plan = make_plan(config, resources, weights=weights)
    if plan.base.has_weights:  # else nothing will be written, and it is planned for other machines
        check_destinations([plan], nodes=resources.nodes if resources is not None else 1)
    return plan


def check_batch_destinations(batch: BatchPlan) -> None:
    """Check that the results of many subjects can be written. Raises InputError if not."""
    check_destinations(batch.subjects, lanes=batch.lanes, nodes=batch.resources.nodes)


def encoder_of(plan: Plan, console: RunConsole) -> str | None:
    """The image encoder that similarities are measured with; None, with a warning, if unavailable."""
    if not plan.config.evaluation.enabled:
        return None
    try:
        return image_encoder(plan.config)
    except InputError as error:
        if plan.config.evaluation.image_encoder is not None:
            raise
        console.warn(f"similarities will not be measured: {error}")
        return None
