"""One subject, end to end, on one screen: class images -> fine-tuning -> evaluation -> registry -> summary."""

import time
from contextlib import ExitStack, closing

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.errors import InputError
from pipelines.cluster.events import event_queue
from pipelines.cluster.ray_cluster import Resources, ray_cluster
from pipelines.driver.clock import Clock
from pipelines.driver.conclude import conclude_stored, finish, track_plan
from pipelines.driver.console import RunConsole
from pipelines.driver.follow import Follower
from pipelines.driver.summary import PersonalizeResult, is_tracked, stored_result
from pipelines.driver.train_stage import train
from pipelines.plan.batch_plan import BatchPlan
from pipelines.plan.run_plan import Plan, check_destinations, describe_plan, make_plan
from pipelines.stages.evaluate_stage import Evaluation, evaluate, image_encoder, sample_requests
from pipelines.stages.evaluation_store import store_evaluation
from pipelines.stages.prior_stage import make_class_images
from pipelines.stages.protocol_stage import run_protocol
from pipelines.tasks import PriorSet, ProtocolTask, Samplers, Source, base_source
from pipelines.tracking.tracked_run import TrackedRun
from pipelines.worker.sampler_pool import SamplerPool


def personalize(config: DreamBoothConfig, console: RunConsole | None = None) -> PersonalizeResult:
    """Run one subject through every stage; the same call again does only what is missing.

    Raises InputError before any work starts when something given is wrong.
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
        for warning in plan.warnings:
            console.warn(warning)
        console.table(describe_plan(plan))
        if resources is None:
            with clock.stage("ray"):
                resources = stack.enter_context(ray_cluster(config.cluster))
        run = stack.enter_context(track_plan(plan, say=console.warn))
        pool = stack.enter_context(closing(_pool(plan, resources)))
        return _stages(plan, pool, encoder, run, console, clock)


def checked_plan(config: DreamBoothConfig, resources: Resources | None = None) -> Plan:
    """The plan of a run, everything it needs looked at."""
    plan = make_plan(config, resources)
    check_destinations(plan, nodes=resources.nodes if resources is not None else 1)
    return plan


def check_batch_destinations(batch: BatchPlan) -> None:
    """Prove that the results of many subjects can be written, each place once; InputError when not."""
    roots = {(plan.config.storage.root, plan.config.tracking): plan for plan in batch.subjects}
    for plan in roots.values():
        check_destinations(plan, nodes=batch.resources.nodes)


def _pool(plan: Plan, resources: Resources) -> SamplerPool:
    here = plan.config.cluster.address is None and resources.nodes == 1
    return SamplerPool(
        actors=plan.config.prior.num_actors or (resources.gpus if plan.use_gpu else resources.cpus),
        use_gpu=plan.use_gpu,
        keep=here and not plan.use_gpu,
    )


def _stages(
    plan: Plan, pool: SamplerPool, encoder: str | None, run: TrackedRun, console: RunConsole, clock: Clock
) -> PersonalizeResult:
    config = plan.config
    with clock.stage("class_images"):
        prior_set = _class_images(plan, pool, console)
    with clock.stage("train"):
        follower = Follower(run, console, config, plan.key)
        with follower, event_queue(follower.handle, follower.warn) as events:
            trained = train(plan, prior_set, events)
    console.line(f"published and verified: {trained.model.uri}")
    base, fine_tuned = base_source(plan.config, plan.base.hash), Source(address=trained.model.uri, published=True)
    with pool.started(_wanted(plan, base, fine_tuned)) as samplers:
        with clock.stage("evaluate"):
            evaluation = _evaluate(plan, samplers, base, fine_tuned, encoder, console)
        if plan.protocol is not None:
            with clock.stage("protocol"):
                _measure(plan.protocol, samplers, base, fine_tuned, console)
    startup = clock.startup(follower.milestones)
    return finish(plan, trained, evaluation, run, clock.seconds, startup)


def encoder_of(plan: Plan, console: RunConsole) -> str | None:
    """The image encoder that similarities are measured with; None, with a warning, where there is none to be had."""
    if not plan.config.evaluation.enabled:
        return None
    try:
        return image_encoder(plan.config)
    except InputError as error:
        if plan.config.evaluation.image_encoder is not None:
            raise
        console.warn(f"similarities will not be measured: {error}")
        return None


def _class_images(plan: Plan, pool: SamplerPool, console: RunConsole) -> PriorSet | None:
    if plan.prior is None:
        return None
    began = time.perf_counter()
    with console.bar("class images") as update:

        def on_progress(made: int, missing: int) -> None:
            update(made, missing, f"{made / (time.perf_counter() - began):.1f} images/s")

        return make_class_images(
            plan.prior, base_source(plan.config, plan.base.hash), plan.config.prior_uri, pool, on_progress
        )


def _wanted(plan: Plan, base: Source, fine_tuned: Source) -> int:
    """How many calls there are for samplers."""
    samples = (
        len(sample_requests(plan.config, base, fine_tuned, plan.sampling_dtype))
        if plan.config.evaluation.enabled
        else 0
    )
    protocol = plan.protocol
    return samples + (len(protocol.base_sets) + len(protocol.fine_tuned_sets) if protocol is not None else 0)


def _evaluate(
    plan: Plan, samplers: Samplers, base: Source, fine_tuned: Source, encoder: str | None, console: RunConsole
) -> Evaluation | None:
    if not plan.config.evaluation.enabled:
        return None
    with console.bar("evaluation samples") as update:
        evaluation = evaluate(
            plan.config,
            plan.images,
            samplers,
            base=base,
            fine_tuned=fine_tuned,
            encoder=encoder,
            dtype=plan.sampling_dtype,
            on_progress=lambda made, total: update(made, total, "images"),
        )
    store_evaluation(evaluation, plan.config.run_uri, plan.key)
    return evaluation


def _measure(protocol: ProtocolTask, samplers: Samplers, base: Source, fine_tuned: Source, console: RunConsole) -> None:
    with console.bar("protocol samples") as update:
        run_protocol(
            protocol,
            samplers,
            base=base,
            fine_tuned=fine_tuned,
            on_progress=lambda made, total: update(made, total, "images"),
        )
