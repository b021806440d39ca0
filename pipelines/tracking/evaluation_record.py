"""Record an evaluation's figures in MLflow with its model, and pass them to the gate.

Metrics and tags carry the bank's name, as in `miniature/dino`, so that figures of two banks never stand in one column.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.config.evaluation import GateConfig
from dreambooth.evaluation.figures import by_bank
from pipelines.tracking.champion import CHAMPION, Decision, Standing, decide
from pipelines.tracking.client import connect, default_tracking, quietly
from pipelines.tracking.figure_tags import figure_tags, figures_of
from pipelines.tracking.registry import RegisteredVersion
from pipelines.tracking.tracked_run import TrackedRun

# Import after tracking.client, which silences MLflow.
from mlflow import MlflowClient  # isort: skip
from mlflow.entities.model_registry import ModelVersion  # isort: skip


@dataclass(frozen=True, kw_only=True)
class RecordedFigures:
    """Content of evaluation.json at `uri`, and the gate's decision (None for an unregistered model)."""

    uri: str
    evaluation: Mapping[str, Any]
    gate: Decision | None


def describe_figures(evaluation: Mapping[str, Any]) -> str:
    """The paper's five figures in a line."""
    figures = evaluation["figures"]
    names = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "pres": "PRES", "div": "DIV"}
    return ", ".join(f"{shown} {figures[name]['mean']:.3f}" for name, shown in names.items() if name in figures)


def record_evaluation(run: TrackedRun, version: RegisteredVersion | None, evaluation: Mapping[str, Any]) -> None:
    """Log figures as metrics, a table of prompts and evaluation.json with the run; tag the version, where there is one.

    Figures already in the version's tags are not recorded twice.
    """
    client, bank = connect(run.tracking_uri), evaluation["bank"]["name"]
    with quietly(), default_tracking(run.tracking_uri):
        tags = client.get_model_version(version.name, str(version.version)).tags if version is not None else {}
        if tags.get(f"{bank}.key") == evaluation["key"]:
            return
        model_id = version.model_id if version is not None else None
        for by, figures in by_bank(evaluation):
            for name, figure in figures.items():
                client.log_metric(run.run_id, f"{by.name}/{name}", figure["mean"], synchronous=True, model_id=model_id)
        folder = f"evaluation/{bank}-{evaluation['key']}"
        if folder not in {artifact.path for artifact in client.list_artifacts(run.run_id, "evaluation")}:
            run.log_table(evaluation["per_prompt"], f"{folder}/prompts.json")
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary, "evaluation.json")
                path.write_text(json.dumps(evaluation, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
                run.log_artifact(path, folder)
        if version is not None:
            for name, value in figure_tags(evaluation).items():
                client.set_model_version_tag(version.name, str(version.version), name, value)


def pass_gate(
    tracking_uri: str, version: RegisteredVersion, gate: GateConfig, bank: str, *, force: bool = False
) -> Decision:
    """Judge a version by its recorded figures of a bank, and move the alias `champion` to it if it is good enough."""
    client = connect(tracking_uri)
    with quietly():
        candidate = _standing(client.get_model_version(version.name, str(version.version)), bank)
        champion = _champion(client, version.name)
        decision = decide(candidate, None if champion is None else _standing(champion, bank), gate, force=force)
        if decision.moved:
            client.set_registered_model_alias(version.name, CHAMPION, str(version.version))
        against = "none" if champion is None else str(champion.version)
        tags = {"moved": str(decision.moved).lower(), "reason": decision.reason, "champion": against, "bank": bank}
        for name, value in tags.items():
            client.set_model_version_tag(version.name, str(version.version), f"gate.{name}", value)
    return decision


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    aliases = client.get_registered_model(name).aliases
    return client.get_model_version(name, str(aliases[CHAMPION])) if CHAMPION in aliases else None


def _standing(version: ModelVersion, bank: str) -> Standing:
    tags = version.tags
    return Standing(
        version=int(version.version),
        figures=figures_of(tags, bank),
        bank=tags.get(f"{bank}.hash"),
        prompts=tags.get(f"{bank}.prompts"),
    )
