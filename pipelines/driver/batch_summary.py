"""The end of a batch: report.html and summary.json in its folder, and both with the pictures in MLflow."""

import io
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth.amounts import counted, duration
from dreambooth.config.settings import DreamBoothConfig
from dreambooth.evaluation.figures import BankId, by_bank
from dreambooth.models.cascade import SUPER_RESOLUTION
from pipelines.driver.samples import sample_uri
from pipelines.plan.batch_plan import BatchPlan, describe_batch
from pipelines.plan.lanes_per_gpu import gpu_kind
from pipelines.plan.pace import remember_paces
from pipelines.plan.run_plan import Plan
from pipelines.report.batch_report import SHOWN, render_report
from pipelines.report.batch_result import BatchResult, SubjectResult
from pipelines.report.evaluated import find_evaluated, warnings_in
from pipelines.report.links import relative_link
from pipelines.report.retrieval import Embedded, retrieved_by_bank
from pipelines.stages.embeddings import embeddings_uri
from pipelines.storage.files import exists, join, read_bytes, read_json, write_bytes, write_json
from pipelines.tasks import STATES, SubjectRecord
from pipelines.tracking.client import explain
from pipelines.tracking.tracked_run import TrackedRun


def write_batch_summary(
    plan: BatchPlan, records: Sequence[SubjectRecord], run: TrackedRun, *, seconds: float, untracked: str | None = None
) -> dict[str, Any]:
    """Write a batch's results to its folder and MLflow run, and end the run. Returns the content of summary.json.

    `untracked` is the reason why published subjects are not in MLflow.
    """
    plans = {subject.config.subject.name: subject for subject in plan.subjects}
    subjects = [_subject(plan, plans[record.name], record, shown=place < SHOWN) for place, record in enumerate(records)]
    counts = Counter(record.state for record in records)
    lede = ", ".join((counted(len(records), "subject"), f"{datetime.now(UTC):%-d %B %Y, %H:%M} UTC", duration(seconds)))
    retrieved = retrieved_by_bank(subject.embedded for subject in subjects if subject.embedded is not None)
    page = render_report(
        BatchResult(
            name=plan.name,
            lede=lede,
            facts=describe_batch(plan),
            commands=[("MLflow", run.hint)],
            subjects=subjects,
            retrieved=retrieved,
        )
    )
    write_bytes(join(plan.uri, "report.html"), page.encode())
    summary = {
        "name": plan.name,
        "subjects": {state: counts[state] for state in STATES} | {"total": len(records)},
        "lanes": plan.lanes,
        "wall_seconds": round(seconds, 2),
        "lane_busy_share": lane_busy_share(subjects),
        "report": join(plan.uri, "report.html"),
        "mlflow": {"look": run.hint, "run_id": run.known_id},
        "failures": {record.name: record.reason for record in records if record.state == "failed"},
        "warnings": {subject.record.name: list(subject.warnings) for subject in subjects if subject.warnings},
        "retrieval": [bank.as_dict() for bank in retrieved],
        "results": [_row(subject) for subject in subjects],
    }
    paces = (
        measured
        for subject in subjects
        for measured in zip(
            plans[subject.record.name].stages,
            (subject.steps_per_second, subject.second_steps_per_second),
            strict=False,
        )
    )
    root, gpu = plan.subjects[0].config.storage.root, gpu_kind(plan.resources)
    remember_paces(root, plan.name, paces, gpu=gpu, lanes_per_gpu=plan.lanes_per_gpu)
    _track(run, subjects, summary, page)
    # The same command resumes an unfinished one.
    whole = counts["done"] + counts["failed"] == len(records)
    error = run.end("FINISHED" if whole else "KILLED")
    summary["untracked"] = untracked or (None if error is None else explain(error))
    summary["mlflow"] = {"look": run.hint, "run_id": run.known_id}
    write_json(join(plan.uri, "summary.json"), summary)
    return summary


def lane_busy_share(subjects: Sequence[SubjectResult]) -> float | None:
    """Seconds of training over those of all lanes, from the first subject's start to the last one's publication.

    Class images, loading, evaluation and waiting at the end all lower it. Each driver's lanes count separately.
    """
    drivers: dict[str, list[SubjectResult]] = {}
    for subject in subjects:
        record = subject.record
        if record.state == "done" and record.lane and record.began and record.ended and subject.step_seconds:
            drivers.setdefault(record.lane.partition("/")[0], []).append(subject)
    total = busy = 0.0
    for done in drivers.values():
        span = max(s.record.ended or 0.0 for s in done) - min(s.record.began or 0.0 for s in done)
        total += span * len({subject.record.lane for subject in done})
        busy += sum(subject.step_seconds or 0.0 for subject in done)
    return round(busy / total, 4) if total else None


def _subject(batch: BatchPlan, plan: Plan, record: SubjectRecord, *, shown: bool) -> SubjectResult:
    config, uri = plan.config, plan.config.run_uri
    if record.state not in ("done", "trained") or not exists(join(uri, "summary.json")):
        return SubjectResult(record=record)
    summary = read_json(join(uri, "summary.json"))
    trainings = [summary] if (second := summary.get(SUPER_RESOLUTION)) is None else [summary, second]
    paces = [training["steps_per_second"] for training in trainings]
    made = [training["steps"] - training["resumed_from"] for training in trainings]
    name, version, sheet = summary["registered_model"], summary["version"], summary["contact_sheet"]
    history = read_json(join(uri, "training", f"{plan.key}.json"))["history"] if shown else ()
    return SubjectResult(
        record=record,
        uri=uri,
        page=relative_link(report, batch.uri) if (report := summary.get("report")) else None,
        sample=sample_uri(config, prompts[0], 0) if (prompts := _prompts(config)) else None,
        registered=f"{name} version {version}" if name else None,
        model_uri=summary["model_uri"],
        similarity=summary["similarity"],
        verdict=summary.get("verdict"),
        warnings=warnings_in(summary),
        figures=_figures(summary),
        steps_per_second=paces[0],
        second_steps_per_second=None if second is None else paces[1],
        step_seconds=sum(steps / pace for steps, pace in zip(made, paces, strict=True) if pace) or None,
        history=history,
        scores=summary.get("scores", ()),
        contact_sheet=read_bytes(sheet) if shown and sheet else None,
        evaluated=find_evaluated(uri, summary) if shown else None,
        embedded=_embedded(record.name, summary),
    )


def _prompts(config: DreamBoothConfig) -> list[str]:
    """The prompts of the samples for the eye."""
    return config.evaluation.prompts_of(config.subject, config.prompts) if config.evaluation.enabled else []


def _embedded(subject: str, summary: dict[str, Any]) -> Embedded | None:
    if (evaluation := summary.get("evaluation")) is None:
        return None
    return Embedded(subject=subject, bank=str(BankId(**evaluation["bank"])), address=embeddings_uri(evaluation["uri"]))


def _figures(summary: dict[str, Any]) -> dict[str, float]:
    if (evaluation := summary.get("evaluation")) is None:
        return {}
    return {f"{bank.name}_{name}": figure["mean"] for bank, own in by_bank(evaluation) for name, figure in own.items()}


def _row(subject: SubjectResult) -> dict[str, Any]:
    """A line of the batch's table."""
    record = subject.record
    return {
        "subject": record.name,
        "class_noun": record.class_noun,
        "identifier": record.identifier,
        "state": record.state,
        "attempts": record.attempts,
        "failures": record.failures,
        "reason": record.reason,
        "registered": subject.registered,
        "uri": subject.uri,
        "model_uri": subject.model_uri,
        "steps_per_second": subject.steps_per_second,
        **{f"similarity_{name}": value for name, value in (subject.similarity or {}).items()},
        **{name: subject.verdict[name] for name in ("near_copies", "prompts_followed") if subject.verdict},
        "warnings": " | ".join(subject.warnings),
        **subject.figures,
    }


def _track(run: TrackedRun, subjects: Sequence[SubjectResult], summary: dict[str, Any], page: str) -> None:
    run.log_table([_row(subject) for subject in subjects], "subjects.json")
    for subject in subjects:
        if subject.contact_sheet is not None:
            sheet = Image.open(io.BytesIO(subject.contact_sheet)).convert("RGB")
            run.log_image(sheet, f"contact_sheets/{subject.record.name}", 0)
    run.log_metrics({f"subjects/{state}": count for state, count in summary["subjects"].items()}, 0)
    for of_bank in summary["retrieval"]:
        name = of_bank["bank"].partition("@")[0]
        figures = {figure: of_bank[figure]["mean"] for figure in ("rank_1", "mean_average_precision")}
        run.log_metrics({f"{name}/retrieval_{figure}": mean for figure, mean in figures.items()}, 0)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("report.html", page), ("summary.json", json.dumps(summary, indent=2))):
            Path(folder, name).write_text(content)
            run.log_artifact(Path(folder, name))
