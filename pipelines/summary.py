"""The end of a run: pictures and figures in its folder and in MLflow, and summary.json for machines."""

import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.evaluate_stage import Evaluation, Similarity, prompts_of
from pipelines.plan import Plan
from pipelines.registry import RegisteredVersion
from pipelines.report import Row, contact_sheet, loss_curve
from pipelines.storage import join, write_bytes, write_json
from pipelines.tracking import TrackedRun
from pipelines.train_stage import TrainResult


@dataclass(frozen=True, kw_only=True)
class PersonalizeResult:
    """What one run ends with; `summary` is what summary.json holds."""

    run_uri: str
    model_uri: str
    registered: RegisteredVersion | None
    contact_sheet: str
    loss_curve: str
    similarity: Similarity | None
    mlflow: str
    summary: dict[str, Any]


def write_summary(
    plan: Plan,
    trained: TrainResult,
    evaluation: Evaluation,
    version: RegisteredVersion | None,
    run: TrackedRun,
    seconds: dict[str, float],
    milestones: dict[str, float],
) -> PersonalizeResult:
    """Write contact sheet, loss curve, samples and summary.json to the run's folder, and the pictures to MLflow."""
    uri = plan.config.run_uri
    steps = plan.config.train.max_train_steps
    sheet = contact_sheet(_rows(plan, evaluation), title=_title(plan))
    curve = loss_curve(trained.history)
    pictures = {"contact_sheet.png": sheet, "loss_curve.png": curve}
    for name, picture in pictures.items():
        write_bytes(join(uri, name), _png(picture))
        run.log_image(picture, Path(name).stem, steps)
    for prompt, images in evaluation.after.items():
        for index, image in enumerate(images):
            write_bytes(join(uri, "samples", _slug(prompt), f"{plan.config.evaluation.seed + index}.png"), image)
    if evaluation.similarity is not None:
        run.log_metrics({f"similarity/{name}": value for name, value in asdict(evaluation.similarity).items()}, steps)
    summary = {
        "subject": plan.config.subject.name,
        "class_noun": plan.config.subject.class_noun,
        "identifier": plan.config.subject.identifier,
        "registered_model": version.name if version else None,
        "version": version.version if version else None,
        "model_uri": trained.model.uri,
        "contact_sheet": join(uri, "contact_sheet.png"),
        "loss_curve": join(uri, "loss_curve.png"),
        "mlflow": {"tracking_uri": run.hint, "run_id": run.run_id},
        "engine": plan.engine,
        "zero_stage": plan.config.zero.stage if plan.engine == "deepspeed" else None,
        "workers": plan.config.cluster.num_workers,
        "class_images": plan.prior.count if plan.prior else 0,
        "steps": steps,
        "steps_per_second": round(trained.steps_per_second, 3),
        "peak_memory_bytes": list(trained.peak_memory_bytes),
        "resumed_from": trained.resumed_from,
        "wall_seconds": seconds | {"total": round(sum(seconds.values()), 2)},
        "milestones": milestones,
        "similarity": asdict(evaluation.similarity) if evaluation.similarity else None,
        "key": plan.key,
    }
    write_json(join(uri, "summary.json"), summary)
    return PersonalizeResult(
        run_uri=uri,
        model_uri=trained.model.uri,
        registered=version,
        contact_sheet=join(uri, "contact_sheet.png"),
        loss_curve=join(uri, "loss_curve.png"),
        similarity=evaluation.similarity,
        mlflow=run.hint,
        summary=json.loads(json.dumps(summary)),
    )


def describe_result(result: PersonalizeResult) -> list[tuple[str, str]]:
    """The result as (what, value) rows: every path, and what to do next."""
    rows = [("contact sheet", result.contact_sheet), ("loss curve", result.loss_curve), ("model", result.model_uri)]
    if result.similarity is not None:
        similarity = result.similarity
        rows.append(
            (
                "similarity",
                f"{similarity.identifier:.2f} with the identifier, {similarity.instance:.2f} among the photographs; "
                f"class prompt {similarity.class_before:.2f} before, {similarity.class_after:.2f} after",
            )
        )
    if result.registered is not None:
        prompt = f"a [V] {result.summary['class_noun']} on the beach"
        rows.append(("registered", f"{result.registered.name}, version {result.registered.version}"))
        rows.append(("generate", f'dreambooth generate --model models:/{result.registered.name}@latest "{prompt}"'))
    return [*rows, ("summary", f"{result.run_uri}/summary.json"), ("MLflow", result.mlflow)]


def _title(plan: Plan) -> str:
    subject = plan.config.subject
    return f"{subject.name}: [V] = {subject.identifier}, {subject.class_noun}"


def _rows(plan: Plan, evaluation: Evaluation) -> list[Row]:
    shown = plan.config.evaluation.images_per_prompt
    return [
        Row(title="instance images", images=[_open(image) for image in evaluation.instance]),
        *(
            Row(
                title=prompt,
                images=[_open(image) for image in evaluation.after[prompt][:shown]],
                baseline=[_open(image) for image in evaluation.before[prompt][:shown]],
            )
            for prompt in [*prompts_of(plan.config), evaluation.class_prompt]
        ),
    ]


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:80]


def _open(image: bytes) -> Image.Image:
    return Image.open(io.BytesIO(image)).convert("RGB")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
