"""Drive a batch of one, and conclude its subject on the run's own screen."""

import secrets
from contextlib import suppress

from dreambooth.amounts import counted
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.batch import queued_subjects
from pipelines.driver.clock import Clock
from pipelines.driver.conclude import conclude_stored, finish, track_plan
from pipelines.driver.console import RunConsole
from pipelines.driver.driving import Driver, ending_with, until_ended
from pipelines.driver.follow import Curves
from pipelines.driver.lanes import Lanes
from pipelines.driver.run_view import RunView
from pipelines.driver.summary import PersonalizeResult, is_tracked, stored_result
from pipelines.driver.train_stage import find_result
from pipelines.plan.batch_plan import BatchPlan
from pipelines.plan.lanes_per_gpu import gpu_kind
from pipelines.plan.pace import remember_paces
from pipelines.plan.run_plan import Plan
from pipelines.queue.queue_actor import start_queue
from pipelines.storage.files import join, remove
from pipelines.tasks import BankAddress
from pipelines.tracking.tracked_run import TrackedRun


def find_stored(plan: Plan, console: RunConsole) -> PersonalizeResult | None:
    """The result of an earlier run of the same request, completed in MLflow; None if there is none."""
    if (stored := stored_result(plan)) is None:
        return None
    if is_tracked(plan, stored):
        console.line(f"nothing to do: {plan.config.run_uri} holds the result of this configuration")
        return stored
    console.line(f"{plan.config.run_uri} holds the result of this configuration; only what MLflow lacks is sent")
    return conclude_stored(plan, earlier=stored.summary, say=console.warn)


def drive(
    plan: Plan, resources: Resources, encoder: BankAddress | None, console: RunConsole, clock: Clock
) -> PersonalizeResult:
    """Drive a batch of one; its queue and lane leave no files."""
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
    remove(work.uri)  # left by a killed driver
    name = secrets.token_hex(4)
    queue = start_queue(work.uri, name, queued_subjects(work), retries=plan.config.cluster.max_failures)
    lanes = Lanes(work, name, queue, encoder)
    console.line(f"starting {counted(plan.config.cluster.num_workers, 'worker')}")
    clock.begin("train")
    lanes.start()
    results: list[PersonalizeResult] = []
    with (
        ending_with(lanes, queue),
        track_plan(plan, say=console.warn) as run,
        RunView(console, *(stage.config.train.max_train_steps for stage in plan.stages)) as view,
        Curves(lambda one: run) as curves,
    ):

        def conclude(one: Plan) -> str:
            clock.take_lane(view.milestones, protocol=one.protocol is not None)
            results.append(_finish(one, run, view, clock, gpu_kind(resources)))
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


def _finish(plan: Plan, run: TrackedRun, view: RunView, clock: Clock, gpu: str) -> PersonalizeResult:
    trained = find_result(plan)
    if trained is None:
        raise RuntimeError(f"training ended, but there is no model at {join(plan.config.run_uri, 'model')}")
    view.line(f"published and verified: {trained.model.uri}")
    root = plan.config.storage.root
    if plan.config.run_uri.startswith(join(root, "")):  # else nothing of the run lies below the root
        measured = [trained] if trained.second is None else [trained, trained.second]
        paces = zip(plan.stages, (one.steps_per_second for one in measured), strict=True)
        with suppress(OSError):  # no reason to fail a run that is published
            remember_paces(root, plan.config.subject.name, paces, gpu=gpu)
    return finish(plan, trained, run, clock.seconds, clock.startup(view.milestones))
