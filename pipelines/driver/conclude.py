"""Conclude a subject: register its published model, and write curves, pictures and summary."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dreambooth.config.addresses import shown
from dreambooth.models.cascade import SUPER_RESOLUTION
from dreambooth.models.served import served_facts
from pipelines.driver.cards import Card, card_of, publish_card
from pipelines.driver.follow import complete_curves, complete_pictures
from pipelines.driver.samples import Samples
from pipelines.driver.summary import PersonalizeResult, write_summary
from pipelines.driver.train_stage import TrainResult, find_result
from pipelines.plan.describe import printable_settings
from pipelines.plan.here import git
from pipelines.plan.run_plan import Plan
from pipelines.report.model_card import description
from pipelines.stages.evaluate_stage import find_evaluation
from pipelines.stages.evaluation_task import EvaluationTask
from pipelines.storage.files import exists, join
from pipelines.storage.publications import Manifest, opened
from pipelines.tracking.evaluation_record import RecordedFigures, describe_figures, pass_gate, record_evaluation
from pipelines.tracking.inputs import Images
from pipelines.tracking.line import Away
from pipelines.tracking.registry import MOST_DESCRIPTION, RegisteredVersion, register, upload_seconds
from pipelines.tracking.runs import begin, track
from pipelines.tracking.tracked_run import TrackedRun

# Import after tracking.client, which silences MLflow.
from mlflow.exceptions import MlflowException  # isort: skip


def conclude(plan: Plan, batch_run_id: str, batch_uri: str) -> str:
    """Register a published model, and write curves, pictures and summary.json. Returns the result in a line.

    The subject gets an MLflow run nested in the batch's, and its page a link to that in the batch's folder. Idempotent:
    one version and the same files. Raises Away if MLflow is unreachable, and MLflow's error if it refuses, after
    writing everything else.
    """
    result = conclude_stored(plan, parent=batch_run_id, batch=batch_uri)
    if result is None:
        raise RuntimeError(f"{plan.config.subject.name} has no model, or no figures of it, at {plan.config.run_uri}")
    if result.error is not None:
        raise result.error
    summary = result.summary
    similarity, evaluation = summary["similarity"], summary["evaluation"]
    measured = f", similarity {similarity['identifier']:.2f}" if similarity is not None else ""
    if (verdict := summary["verdict"]) is not None:
        measured += f", {verdict['near_copies']:.0%} near-copies"
    if evaluation is not None:
        measured += f", {describe_figures(evaluation)}"
    name = summary["registered_model"]
    return f"{name} version {summary['version']}{measured}" if name else f"{summary['model_uri']}{measured}"


def conclude_stored(
    plan: Plan,
    *,
    earlier: Mapping[str, Any] | None = None,
    parent: str | None = None,
    batch: str | None = None,
    say: Callable[[str], None] | None = None,
) -> PersonalizeResult | None:
    """Conclude a subject with stored model and pictures; None if either is missing.

    `earlier` is the summary of the command that stored them.
    """
    trained = find_result(plan)
    if trained is None or not all(exists(task.uri) for task in plan.evaluations):
        return None
    seconds = {"train": round(trained.seconds, 2)}
    if earlier is not None:
        seconds = {stage: spent for stage, spent in earlier["wall_seconds"].items() if stage != "total"}
    with track_plan(plan, parent=parent, say=say) as run:
        startup = earlier["startup_seconds"] if earlier else None
        return finish(plan, trained, run, seconds, startup, batch=batch)


def track_plan(
    plan: Plan, *, parent: str | None = None, say: Callable[[str], None] | None = None
) -> AbstractContextManager[TrackedRun]:
    """The MLflow run of a plan."""
    return track(plan.config.tracking, **_identity(plan), parent=parent, say=say)


def begin_run(plan: Plan, *, parent: str | None) -> TrackedRun:
    """Start the MLflow run of a plan; `track_plan` resumes and ends it."""
    return begin(plan.config.tracking, **_identity(plan), parent=parent)


def _identity(plan: Plan) -> dict[str, Any]:
    return {
        "run_name": plan.config.subject.name,
        "params": printable_settings(plan.config),
        "tags": result_tags(plan),
        "inputs": _inputs(plan),
        "resume_key": plan.key,
    }


def _inputs(plan: Plan) -> tuple[Images, ...]:
    """The images that a plan's run reads, or makes and reads."""
    config, name = plan.config, plan.config.subject.name
    inputs = [
        Images(
            name=name,
            hash=plan.data_hash,
            addresses=config.subject.instance_images,
            count=len(plan.images),
            context="training",
        )
    ]
    if plan.prior is not None:
        inputs.append(
            Images(
                name=f"class images of {config.subject.class_noun}",
                hash=plan.prior.key,
                addresses=[join(config.prior_uri, plan.prior.key)],
                count=plan.prior.count,
                context="class images",
            )
        )
    if config.evaluation.real_images is not None:
        inputs.append(
            Images(
                name=f"{name}, other photographs",
                hash=plan.compared.data_hash,
                addresses=config.evaluation.real_images,
                count=len(plan.compared.images),
                context="evaluation",
            )
        )
    return tuple(inputs)


def finish(
    plan: Plan,
    trained: TrainResult,
    run: TrackedRun,
    seconds: dict[str, float],
    startup: dict[str, float] | None,
    *,
    batch: str | None = None,
) -> PersonalizeResult:
    """Publish a model's card, register it, and write pictures and summary with anything missing from MLflow."""
    complete_curves(run, trained.history, trained.scores)
    if trained.second is not None:
        complete_curves(run, trained.second.history, trained.second.scores, SUPER_RESOLUTION)
    complete_pictures(run, plan.config, plan.key)
    samples = None if plan.samples is None else Samples(plan.samples.uri, _figures_at(plan, plan.samples))
    figures, version = find_figures(plan), None
    made = card_of(plan, trained, samples, figures.evaluation if figures else None)
    card = publish_card(made, plan.config.run_uri, plan.key)
    error: Exception | None = None
    began = time.perf_counter()
    try:
        if plan.config.tracking.register_model:
            version = register_result(plan, trained, card, run)
        figures = figures and record_figures(plan, figures, version, run)
    except (Away, MlflowException) as caught:
        error = caught
    seconds = seconds | {"register": round(time.perf_counter() - began, 2)}
    return write_summary(plan, trained, samples, figures, card, version, run, seconds, startup, error, batch=batch)


def find_figures(plan: Plan) -> RecordedFigures | None:
    """The protocol's figures before the gate; None without a protocol."""
    if (task := plan.protocol) is None:
        return None
    return RecordedFigures(uri=task.uri, evaluation=_figures_at(plan, task), gate=None)


def _figures_at(plan: Plan, task: EvaluationTask) -> dict[str, Any]:
    evaluation = find_evaluation(task)
    if evaluation is None:
        raise RuntimeError(f"the figures of {plan.config.subject.name} are not at {task.uri}")
    return evaluation


def record_figures(
    plan: Plan, figures: RecordedFigures, version: RegisteredVersion | None, run: TrackedRun
) -> RecordedFigures:
    """Record the protocol's figures with the registered version, then apply the gate."""
    evaluation = figures.evaluation
    run.call(lambda client, run_id: record_evaluation(run, version, evaluation))
    if version is None:
        return figures
    bank = evaluation["bank"]["name"]
    gate = run.call(lambda client, run_id: pass_gate(run.tracking_uri, version, plan.config.gate, bank))
    return replace(figures, gate=gate)


def register_result(plan: Plan, trained: TrainResult, card: Card, run: TrackedRun) -> RegisteredVersion:
    """Register a published model with tags of its origin, described by its card."""
    config = plan.config
    with _registered_form(plan, trained.model) as model:
        size = 0
        if isinstance(model, Path):
            size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
        return run.call(
            lambda client, run_id: register(
                run_id=run_id,
                tracking_uri=run.tracking_uri,
                model=model,
                name=config.model_name,
                tags=result_tags(plan) | {"published": trained.model.uri},
                identifier=str(config.subject.identifier),
                class_noun=config.subject.class_noun,
                description=description(card.facts, most=MOST_DESCRIPTION),
                result_key=plan.model_key,
                served=_served(plan),
                num_inference_steps=config.evaluation.num_inference_steps,
                guidance_scale=config.evaluation.guidance_scale,
                resolution=int(config.images.resolution or 0),
                tokens=max(reader.length for reader in plan.base.text_readers),
            ),
            extra=upload_seconds(size),
        )


def _served(plan: Plan) -> dict[str, Any]:
    return served_facts(
        plan.base.settings,
        None if plan.second is None else plan.second.base.settings,
        resolution=plan.config.images.resolution,
        noise_levels=plan.config.super_resolution.noise_levels,
    )


@contextmanager
def _registered_form(plan: Plan, model: Manifest) -> Iterator[Manifest | Path]:
    """What a version consists of by `registry.storage`: the publication to refer to, or a folder to copy."""
    form = plan.config.registry.storage
    if form == "reference":
        yield model
        return
    with opened(model) as directory, tempfile.TemporaryDirectory(prefix="dreambooth-delta-") as folder:
        if form == "full":
            yield directory
            return
        from dreambooth.models.delta import write_delta

        delta = Path(folder, "delta")
        write_delta(plan.base, directory, delta, second=None if plan.second is None else plan.second.base)
        yield delta


def result_tags(plan: Plan) -> dict[str, Any]:
    """Tags of a result's origin, for its run and registered version."""
    config = plan.config
    return {
        "subject": config.subject.name,
        "identifier": config.subject.identifier,
        "class_noun": config.subject.class_noun,
        "base_model": shown(config.base_model),
        "base_hash": plan.base.hash,
        **_second_tags(plan.second),
        "data_hash": plan.data_hash,
        "resolution": config.images.resolution,
        "prior_set": plan.prior.key if plan.prior else "none",
        "configuration_hash": plan.key,
        "engine": plan.engine,
        "git_commit": git("rev-parse", "HEAD") or "unknown",
    }


def _second_tags(second: Plan | None) -> dict[str, Any]:
    if second is None:
        return {}
    return {
        f"{SUPER_RESOLUTION}.base_model": shown(second.config.base_model),
        f"{SUPER_RESOLUTION}.base_hash": second.base.hash,
    }
