"""One subject, end to end, on one screen: class images -> fine-tuning -> evaluation -> registry -> summary."""

import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dreambooth.config import DreamBoothConfig
from dreambooth.errors import InputError
from pipelines.clock import Clock
from pipelines.cluster import Resources, ray_cluster
from pipelines.console import RunConsole
from pipelines.evaluate_stage import Evaluation, evaluate, image_encoder, sample_requests
from pipelines.events import event_queue
from pipelines.follow import Follower
from pipelines.plan import Plan, check_destinations, describe_plan, make_plan, printable_settings
from pipelines.prior_stage import PriorSet, make_class_images
from pipelines.registry import RegisteredVersion, check_model_name, register
from pipelines.sampler_pool import SamplerPool
from pipelines.samplers import Source
from pipelines.storage import fetch, local_directory
from pipelines.summary import PersonalizeResult, finished_result, write_summary
from pipelines.tracking import TrackedRun, track
from pipelines.train_stage import TrainResult, train


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
        if (finished := finished_result(plan)) is not None:
            console.line(f"nothing to do: {plan.config.run_uri} holds the result of this configuration")
            return finished
        encoder = _encoder(plan, console)
        for warning in plan.warnings:
            console.warn(warning)
        console.table(describe_plan(plan))
        if resources is None:
            with clock.stage("ray"):
                resources = stack.enter_context(ray_cluster(config.cluster))
        params, name = printable_settings(plan.config), plan.config.subject.name
        run = stack.enter_context(
            track(plan.config.tracking, run_name=name, params=params, tags=_tags(plan), resume_key=plan.key)
        )
        return _stages(plan, resources, encoder, run, console, clock)


def checked_plan(config: DreamBoothConfig, resources: Resources | None = None) -> Plan:
    """The plan of a run, everything it needs looked at."""
    plan = make_plan(config, resources)
    check_model_name(plan.config.model_name)
    check_destinations(plan)
    return plan


def _stages(
    plan: Plan, resources: Resources, encoder: str | None, run: TrackedRun, console: RunConsole, clock: Clock
) -> PersonalizeResult:
    config = plan.config
    pool = SamplerPool(
        actors=config.prior.num_actors or (resources.gpus if plan.use_gpu else resources.cpus), use_gpu=plan.use_gpu
    )
    with clock.stage("class_images"):
        prior_set = _class_images(plan, pool, console)
    with clock.stage("train"):
        follower = Follower(run, console, config)
        with follower, event_queue(follower.handle, follower.warn) as events:
            trained = train(plan, prior_set, events)
        follower.complete(trained.history)
    console.line(f"published and verified: {trained.model.uri}")
    with clock.stage("evaluate"):
        evaluation = _evaluate(plan, trained, pool, encoder, console)
    with clock.stage("register"):
        version = _register(plan, trained, prior_set, run) if config.tracking.register_model else None
    return write_summary(plan, trained, evaluation, version, run, clock.seconds, clock.startup(follower.milestones))


def base_source(plan: Plan) -> Source:
    """The pipeline of a plan's base model."""
    return Source(address=plan.config.base_model, revision=plan.config.revision, base_hash=plan.base.hash)


def _encoder(plan: Plan, console: RunConsole) -> str | None:
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

        return make_class_images(plan.prior, base_source(plan), plan.config.prior_uri, pool, on_progress)


def _evaluate(
    plan: Plan, trained: TrainResult, pool: SamplerPool, encoder: str | None, console: RunConsole
) -> Evaluation | None:
    if not plan.config.evaluation.enabled:
        return None
    base, fine_tuned = base_source(plan), Source(address=trained.model.uri, published=True)
    wanted = len(sample_requests(plan.config, base, fine_tuned))
    with console.bar("evaluation samples") as update, pool.started(wanted) as samplers:
        return evaluate(
            plan.config,
            plan.images,
            samplers,
            base=base,
            fine_tuned=fine_tuned,
            encoder=encoder,
            on_progress=lambda made, total: update(made, total, "images"),
        )


def _register(plan: Plan, trained: TrainResult, prior_set: PriorSet | None, run: TrackedRun) -> RegisteredVersion:
    config = plan.config
    with tempfile.TemporaryDirectory(prefix="dreambooth-model-") as folder:
        return register(
            run_id=run.run_id,
            tracking_uri=run.tracking_uri,
            model_directory=local_directory(trained.model) or fetch(trained.model, Path(folder)),
            name=config.model_name,
            tags=_tags(plan) | {"prior_set": prior_set.key if prior_set else "none", "published": trained.model.uri},
            identifier=str(config.subject.identifier),
            class_noun=config.subject.class_noun,
            result_key=plan.model_key,
            num_inference_steps=config.evaluation.num_inference_steps,
            guidance_scale=config.evaluation.guidance_scale,
        )


def _tags(plan: Plan) -> dict[str, Any]:
    config = plan.config
    return {
        "subject": config.subject.name,
        "identifier": config.subject.identifier,
        "class_noun": config.subject.class_noun,
        "base_model": config.base_model,
        "base_hash": plan.base.hash,
        "data_hash": plan.data_hash,
        "prior_set": plan.prior.key if plan.prior else "none",
        "configuration_hash": plan.key,
        "engine": plan.engine,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str:
    """The commit this project runs from, or "unknown" where it was installed without its history."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()
