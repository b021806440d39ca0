"""The end of a run: pictures and figures in its folder and in MLflow, and summary.json for machines."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dreambooth.amounts import duration
from dreambooth.config.addresses import shown
from dreambooth.config.settings import config_hash
from dreambooth.data.buckets import describe_sizes
from dreambooth.data.images import png_bytes
from dreambooth.models.cascade import SUPER_RESOLUTION
from pipelines.driver.cards import Card
from pipelines.driver.samples import Samples
from pipelines.driver.train_stage import TrainResult
from pipelines.plan.run_plan import Plan
from pipelines.report.evaluated import find_evaluated, warnings_in
from pipelines.report.links import relative_link
from pipelines.report.model_card import README
from pipelines.report.pages import Cell
from pipelines.report.pictures import contact_sheet, loss_curve
from pipelines.report.run_report import RunFacts, render_run
from pipelines.report.verdicts import verdict_of_summary
from pipelines.storage.files import exists, join, read_json, write_bytes, write_json
from pipelines.storage.publications import MANIFEST_NAME
from pipelines.tracking.client import explain, resolve_tracking_uri
from pipelines.tracking.evaluation_record import RecordedFigures, describe_figures
from pipelines.tracking.registry import RegisteredVersion, find_version
from pipelines.tracking.tracked_run import TrackedRun

_SECOND_CURVE = f"{SUPER_RESOLUTION}_loss_curve.png"


@dataclass(frozen=True, kw_only=True)
class PersonalizeResult:
    """Result of one run: its folder, the content of summary.json, and why MLflow lacks part of it, if it does."""

    run_uri: str
    summary: dict[str, Any]
    error: Exception | None = None


def stored_result(plan: Plan) -> PersonalizeResult | None:
    """The result of an earlier run of the same request, or None; MLflow may lack part of it."""
    uri = plan.config.run_uri
    if not exists(join(uri, "summary.json")):
        return None
    summary = read_json(join(uri, "summary.json"))
    if summary.get("request") != request_key(plan) or not exists(join(summary["model_uri"], MANIFEST_NAME)):
        return None
    return PersonalizeResult(run_uri=uri, summary=summary)


def is_tracked(plan: Plan, result: PersonalizeResult) -> bool:
    """Whether MLflow has all of a result."""
    if result.summary.get("untracked") is not None:
        return False
    tracking, form = plan.config.tracking, plan.config.registry.storage
    if not tracking.register_model:
        return True
    published = result.summary["model_uri"]
    version = find_version(tracking.uri, plan.config.model_name, plan.model_key, form=form, published=published)
    return version is not None


def request_key(plan: Plan) -> str:
    """Key of everything a finished run's outputs depend on."""
    tracking = plan.config.tracking.model_copy(update={"uri": resolve_tracking_uri(plan.config.tracking.uri)})
    return config_hash(plan.key, plan.config.evaluation, tracking)


def write_summary(
    plan: Plan,
    trained: TrainResult,
    samples: Samples | None,
    figures: RecordedFigures | None,
    card: Card,
    version: RegisteredVersion | None,
    run: TrackedRun,
    seconds: dict[str, float],
    startup: dict[str, float] | None,
    error: Exception | None = None,
    *,
    batch: str | None = None,
) -> PersonalizeResult:
    """Write the page, pictures, samples and summary.json to the run's folder, and all but the samples to MLflow.

    `error` is the reason why MLflow lacks something, `batch` the folder of the batch. Ends the MLflow run.
    """
    uri, steps = plan.config.run_uri, trained.steps
    pictures = {"loss_curve.png": loss_curve(trained.history)}
    if trained.second is not None and trained.second.steps:
        pictures[_SECOND_CURVE] = loss_curve(trained.second.history)
    similarity = verdict = None
    if samples is not None:
        pictures["contact_sheet.png"] = contact_sheet(samples.rows(), title=_title(plan))
        similarity, verdict = samples.similarity, samples.verdict
        samples.copy(plan.config)
    for name, picture in pictures.items():
        write_bytes(join(uri, name), png_bytes(picture))
        run.log_image(picture, Path(name).stem, steps)
    if similarity is not None:
        run.log_metrics({f"similarity/{name}": value for name, value in asdict(similarity).items()}, steps)
    if verdict is not None:
        shares = {name: verdict[name] for name in ("near_copies", "prompts_followed")}
        run.log_metrics({f"samples/{name}": share for name, share in shares.items() if share is not None}, steps)
    summary = {
        "subject": plan.config.subject.name,
        "class_noun": plan.config.subject.class_noun,
        "identifier": plan.config.subject.identifier,
        "registered_model": version.name if version else None,
        "version": version.version if version else None,
        "model_uri": trained.model.uri,
        "card": join(str(card.uri), README),
        "contact_sheet": join(uri, "contact_sheet.png") if samples else None,
        "loss_curve": join(uri, "loss_curve.png"),
        "report": join(uri, "report.html"),
        "mlflow": {"look": run.hint, "run_id": run.known_id},
        "untracked": _reason(run, error),
        "engine": plan.engine,
        "zero_stage": plan.config.zero.stage if plan.engine == "deepspeed" else None,
        "workers": plan.config.cluster.num_workers,
        "class_images": plan.prior.count if plan.prior else 0,
        **_of_stage(trained),
        SUPER_RESOLUTION: _second(trained.second, uri),
        "wall_seconds": seconds | {"total": round(sum(seconds.values()), 2)},
        "startup_seconds": startup,
        "similarity": asdict(similarity) if similarity else None,
        "verdict": verdict,
        "samples": None if samples is None else {"uri": samples.uri, "bank": samples.record.get("bank")},
        "evaluation": _figures(figures) if figures else None,
        "key": plan.key,
        "request": request_key(plan),
    }
    result = PersonalizeResult(run_uri=uri, summary=json.loads(json.dumps(summary)))
    _write_report(plan, result, trained, run, batch)
    if tags := _tags(summary):
        run.set_tags(tags)
        if version is not None:
            run.set_version_tags(version.name, version.version, tags)
    error = run.end("FINISHED") if error is None else error
    summary |= {"mlflow": {"look": run.hint, "run_id": run.known_id}, "untracked": _reason(run, error)}
    write_json(join(uri, "summary.json"), summary)
    return PersonalizeResult(run_uri=uri, summary=json.loads(json.dumps(summary)), error=error)


def _second(second: TrainResult | None, uri: str) -> dict[str, Any] | None:
    """The training of a cascade's second stage."""
    if second is None:
        return None
    return _of_stage(second) | {"loss_curve": join(uri, _SECOND_CURVE) if second.steps else None}


def _of_stage(trained: TrainResult) -> dict[str, Any]:
    """The training of a base model, or of a cascade's second stage."""
    return {
        "steps": trained.steps,
        "exported_step": trained.exported_step,
        "scores": list(trained.scores),
        "steps_per_second": round(trained.steps_per_second, 3),
        "peak_memory_bytes": list(trained.peak_memory_bytes),
        "resumed_from": trained.resumed_from,
    }


def _tags(summary: Mapping[str, Any]) -> dict[str, str]:
    """What a list of runs or versions shows of a model: similarity, verdict and warnings."""
    tags = {}
    if (similarity := summary["similarity"]) is not None:
        tags["similarity"] = f"{similarity['identifier']:.3f}"
    if summary["verdict"] or summary["evaluation"]:
        tags["verdict"] = verdict_of_summary(summary).name
        tags["warnings"] = " | ".join(warnings_in(summary)) or "none"
    return tags


def _reason(run: TrackedRun, error: Exception | None) -> str | None:
    return None if error is None else f"MLflow at {shown(run.tracking_uri)}: {explain(error)}"


def describe_result(result: PersonalizeResult) -> list[tuple[str, str]]:
    """The result as (what, value) rows: paths, figures and the next command."""
    summary = result.summary
    [*paths, (_, own)] = _places(result)
    rows = paths
    if (similarity := summary["similarity"]) is not None:
        rows.append(
            (
                "similarity",
                f"{similarity['identifier']:.2f} with the identifier, {similarity['instance']:.2f} among the "
                f"instance images; class prompt {similarity['class_before']:.2f} before, "
                f"{similarity['class_after']:.2f} after",
            )
        )
    if (verdict := summary.get("verdict")) is not None:  # earlier versions gave no verdict
        rows.append(("samples", describe_verdict(verdict)))
    if (evaluation := summary["evaluation"]) is not None:
        rows.append(("figures", f"{describe_figures(evaluation)} (bank {evaluation['bank']['name']})"))
    rows += [("warning", warning) for warning in warnings_in(summary)]
    if evaluation is not None and (gate := evaluation["gate"]) is not None:
        rows.append(("champion", f"{'yes' if gate['moved'] else 'not moved'}: {gate['reason']}"))
    if (name := summary["registered_model"]) is not None:
        rows.append(("registered", f"{name}, version {summary['version']}"))
    [*commands, look] = _commands(summary)
    rows += commands
    if (reason := summary.get("untracked")) is not None:
        lacks = "has no model of this run yet" if summary["registered_model"] is None else "lacks some of this run"
        rows.append(("not complete", f"the model is published, but MLflow {lacks} ({reason})"))
    return [*rows, ("summary", own), look]


def _places(result: PersonalizeResult) -> list[tuple[str, str]]:
    """Addresses of a run's files, its summary last."""
    summary = result.summary
    rows = [("loss curve", summary["loss_curve"]), ("model", summary["model_uri"])]
    if "card" in summary:  # earlier versions wrote none
        rows.append(("model card", summary["card"]))
    if (second := summary.get(SUPER_RESOLUTION)) is not None and second["loss_curve"] is not None:
        rows.insert(1, ("second stage", second["loss_curve"]))
    if "report" in summary:  # earlier versions wrote none
        rows.insert(0, ("report", summary["report"]))
    if summary["contact_sheet"] is not None:
        rows.insert(0, ("contact sheet", summary["contact_sheet"]))
    return [*rows, ("summary", f"{result.run_uri}/summary.json")]


def _commands(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What to do next, MLflow last."""
    rows = []
    if (name := summary["registered_model"]) is not None:
        prompt = f"a [V] {summary['class_noun']} on the beach"
        rows.append(("generate", f'dreambooth generate --model models:/{name}@latest "{prompt}"'))
    return [*rows, ("MLflow", summary["mlflow"]["look"])]


def describe_verdict(verdict: Mapping[str, Any]) -> str:
    """The shares of samples and prompts in a line."""
    copies = f"{verdict['near_copies']:.0%} near-copies of a photograph"
    if verdict["prompts_followed"] is None:
        return f"{copies}; prompts followed: not measured (there is one, and no other to compare it with)"
    by = {"text": "", "pictures": " (by whether pictures of different prompts differ)"}[verdict["prompts_by"]]
    return f"{copies}, {verdict['prompts_followed']:.0%} of prompts followed{by}"


def _figures(recorded: RecordedFigures) -> dict[str, Any]:
    evaluation = recorded.evaluation
    intervals = {
        name: {part: figure[part] for part in ("mean", "low", "high", "n", "bank") if part in figure}
        for name, figure in evaluation["figures"].items()
    }
    return {
        "uri": recorded.uri,
        "bank": evaluation["bank"],
        "prompt_list": evaluation["prompt_list"],
        "figures": intervals,
        "warnings": evaluation["warnings"],
        "gate": asdict(recorded.gate) if recorded.gate else None,
    }


def _write_report(
    plan: Plan, result: PersonalizeResult, trained: TrainResult, run: TrackedRun, batch: str | None
) -> None:
    summary, evaluated = result.summary, find_evaluated(result.run_uri, result.summary)
    page = render_run(
        summary,
        RunFacts(
            settings=_settings(plan, summary),
            commands=_commands(summary),
            places=_places(result),
            batch=None if batch is None else _batch_link(batch, result.run_uri),
        ),
        trained.history,
        evaluated,
        second=() if trained.second is None else trained.second.history,
        uri=result.run_uri,
    )
    write_bytes(summary["report"], page.encode())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.html")
        path.write_text(page, encoding="utf-8")
        run.log_artifact(path)


def _settings(plan: Plan, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader of a run's page asks first."""
    train, exported = plan.config.train, summary["exported_step"]
    of = f", the model of step {exported:,} is published" if exported != summary["steps"] else ""
    rate = f"{train.learning_rate:g}"
    if plan.run_text_encoders and train.text_encoder_learning_rate not in (None, train.learning_rate):
        rate += f", text encoders {train.text_encoder_learning_rate:g}"
    rows = [
        ("base model", f"{shown(plan.config.base_model)}, hash {plan.base.hash}"),
        ("steps", f"{summary['steps']:,}{of}"),
        ("learning rate", rate),
        ("seed", str(train.seed)),
        ("photographs", describe_sizes(plan.sizes) if plan.config.images.aspect_buckets else str(len(plan.images))),
        ("class images", f"{summary['class_images']:,}"),
        ("finished", f"{datetime.now(UTC):%-d %B %Y, %H:%M} UTC"),
        ("time", duration(summary["wall_seconds"]["total"])),
    ]
    if (name := summary["registered_model"]) is not None:
        rows.append(("registered", f"{name}, version {summary['version']}"))
    return rows


def _batch_link(batch: str, run_uri: str) -> Cell:
    return Cell(text=batch.rsplit("/", 1)[-1], link=relative_link(join(batch, "report.html"), run_uri))


def _title(plan: Plan) -> str:
    subject = plan.config.subject
    return f"{subject.name}: [V] = {subject.identifier}, {subject.class_noun}"
