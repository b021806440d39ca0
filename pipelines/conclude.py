"""The end of one subject: its published model is registered, and what there is to see of it is written."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pipelines.evaluation_record import RecordedFigures, describe_figures, pass_gate, record_evaluation
from pipelines.evaluation_store import load_evaluation
from pipelines.follow import complete_curves
from pipelines.plan import Plan, printable_settings
from pipelines.protocol_stage import find_evaluation
from pipelines.registry import RegisteredVersion, register
from pipelines.storage import opened
from pipelines.summary import write_summary
from pipelines.tracking import TrackedRun, track
from pipelines.train_stage import TrainResult, find_result


def conclude(plan: Plan, batch_run_id: str) -> str:
    """Register what a lane has published, write curves, pictures and summary.json; says in a line what came out.

    The subject gets an MLflow run nested in the batch's. Doing it again is one version and the same files.
    """
    with track(
        plan.config.tracking,
        run_name=plan.config.subject.name,
        params=printable_settings(plan.config),
        resume_key=plan.key,
        parent=batch_run_id,
    ) as run:
        return _conclude(plan, run)


def _conclude(plan: Plan, run: TrackedRun) -> str:
    trained = find_result(plan)
    if trained is None:
        raise RuntimeError(f"there is no model of {plan.config.subject.name} at {plan.config.run_uri}")
    run.set_tags(result_tags(plan))
    complete_curves(run, trained.history, trained.scores)
    evaluation = load_evaluation(plan.config.run_uri, plan.key) if plan.config.evaluation.enabled else None
    version = register_result(plan, trained, run) if plan.config.tracking.register_model else None
    figures = record_figures(plan, version, run)
    seconds = {"train": round((trained.steps - trained.resumed_from) / trained.steps_per_second, 2)}
    write_summary(plan, trained, evaluation, figures, version, run, seconds, None)
    similarity = evaluation.similarity if evaluation is not None else None
    told = f", similarity {similarity.identifier:.2f}" if similarity is not None else ""
    if figures is not None:
        told += f", {describe_figures(figures.evaluation)}"
    return f"{version.name} version {version.version}{told}" if version else f"{trained.model.uri}{told}"


def record_figures(plan: Plan, version: RegisteredVersion | None, run: TrackedRun) -> RecordedFigures | None:
    """Put the protocol's figures beside the registered version, and let the gate judge it; None without a protocol."""
    if plan.protocol is None:
        return None
    evaluation = find_evaluation(plan.protocol)
    if evaluation is None:
        raise RuntimeError(f"the figures of {plan.config.subject.name} are not at {plan.protocol.uri}")
    record_evaluation(run, version, evaluation)
    bank = evaluation["bank"]["name"]
    gate = pass_gate(run.tracking_uri, version, plan.config.gate, bank) if version is not None else None
    return RecordedFigures(uri=plan.protocol.uri, evaluation=evaluation, gate=gate)


def register_result(plan: Plan, trained: TrainResult, run: TrackedRun) -> RegisteredVersion:
    """Register a published model with the tags that say what made it."""
    config = plan.config
    with opened(trained.model) as model, tempfile.TemporaryDirectory(prefix="dreambooth-delta-") as delta:
        directory = model
        if config.registry.storage == "delta":
            from dreambooth.delta import write_delta

            directory = Path(delta, "delta")
            write_delta(plan.base, model, directory)
        return register(
            run_id=run.run_id,
            tracking_uri=run.tracking_uri,
            model_directory=directory,
            name=config.model_name,
            tags=result_tags(plan) | {"published": trained.model.uri, "stored_as": config.registry.storage},
            identifier=str(config.subject.identifier),
            class_noun=config.subject.class_noun,
            result_key=plan.model_key,
            num_inference_steps=config.evaluation.num_inference_steps,
            guidance_scale=config.evaluation.guidance_scale,
            resolution=int(config.images.resolution or 0),
        )


def result_tags(plan: Plan) -> dict[str, Any]:
    """What a result was made of, for its run and its registered version."""
    config = plan.config
    return {
        "subject": config.subject.name,
        "identifier": config.subject.identifier,
        "class_noun": config.subject.class_noun,
        "base_model": config.base_model,
        "base_hash": plan.base.hash,
        "data_hash": plan.data_hash,
        "resolution": config.images.resolution,
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
