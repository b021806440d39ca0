"""Run the paper's experiments as one batch, and make tables, findings and the page from its evaluations.

Training and measurement use the batch's queue and lanes, so the same command again does only what is missing, and a
page can be made at any time from the evaluations so far.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreambooth.amounts import counted
from dreambooth.errors import InputError
from dreambooth.evaluation.figures import BankId
from pipelines.apps.paper.markdown import render_markdown
from pipelines.apps.paper.page import render_page
from pipelines.apps.paper.rows import Setting
from pipelines.apps.paper.sheets import contact_sheets
from pipelines.apps.paper.tables import Table, as_records, findings_as_records, make_tables
from pipelines.apps.paper.trials import Trial, distinct_plans, plan_trials
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.batch import run_batch
from pipelines.driver.driving import View
from pipelines.driver.personalize import check_batch_destinations
from pipelines.plan.batch_plan import BatchPlan, make_batch_plan
from pipelines.plan.run_plan import Plan
from pipelines.stages.evaluate_stage import find_evaluation
from pipelines.storage.files import join, write_bytes, write_json


@dataclass(frozen=True, kw_only=True)
class PaperPlan:
    """All trials by table, the batch of their distinct runs, and a usual run of each base model, trained or not."""

    setting: Setting
    output: str
    trials: tuple[Trial, ...]
    batch: BatchPlan
    usual: Mapping[str, Plan]


@dataclass(frozen=True, kw_only=True)
class PaperResult:
    """The tables, the addresses of the page and tables.json, and failed runs by name."""

    tables: tuple[Table, ...]
    page: str
    records: str
    failures: Mapping[str, str]
    interrupted: bool


def plan_paper(setting: Setting, output: str, overrides: Sequence[str], resources: Resources) -> PaperPlan:
    """Check all runs, and find rows that share one. Raises InputError for any fault.

    A run has the same name and place whichever of the setting's tables are made.
    """
    planned = plan_trials(setting, output, overrides, resources)
    usual = {trial.row.base_model: trial.plan for trial in reversed(planned) if not trial.row.settings}
    trials = tuple(trial for trial in planned if not setting.tables or trial.experiment.name in setting.tables)
    batch = make_batch_plan(f"paper-{setting.name}", distinct_plans(trials), resources)
    check_batch_destinations(batch)
    return PaperPlan(setting=setting, output=output, trials=trials, batch=batch, usual=usual)


def run_paper(plan: PaperPlan, view: View) -> PaperResult:
    """Train and measure missing runs, and write the page. Ray must be running.

    Raises RuntimeError if no lane can work, InputError if no run has an evaluation.
    """
    outcome = run_batch(plan.batch, view, None)
    return write_paper(plan, failures=outcome.summary["failures"], interrupted=outcome.interrupted)


def write_paper(plan: PaperPlan, *, failures: Mapping[str, str], interrupted: bool = False) -> PaperResult:
    """Make tables and page from existing evaluations."""
    evaluations = found_evaluations(plan.trials)
    if not evaluations:
        raise InputError(f"no run below {plan.output} has been evaluated yet, so there is nothing to put into tables")
    tables, bank = make_tables(plan.trials, evaluations)
    records = {
        "setting": plan.setting.name,
        "bank": {"name": bank.name, "hash": bank.hash},
        "runs": len(plan.batch.subjects),
        "evaluated": len(evaluations),
        "cells": as_records(tables),
        "findings": findings_as_records(tables),
    }
    write_json(join(plan.output, "tables.json"), records)
    facts = describe_paper(plan, bank, evaluated=len(evaluations))
    page = render_page(tables, facts, contact_sheets(plan.trials, evaluations))
    write_bytes(join(plan.output, "index.html"), page.encode())
    write_bytes(join(plan.output, "tables.md"), render_markdown(tables, facts).encode())
    return PaperResult(
        tables=tables,
        page=join(plan.output, "index.html"),
        records=join(plan.output, "tables.json"),
        failures=failures,
        interrupted=interrupted,
    )


def found_evaluations(trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """Contents of existing evaluation.json files, by the key of the run's plan."""
    found = {plan.key: _evaluation(plan) for plan in distinct_plans(trials)}
    return {key: evaluation for key, evaluation in found.items() if evaluation is not None}


def describe_paper(plan: PaperPlan, bank: BankId, *, evaluated: int) -> list[tuple[str, str]]:
    """Facts behind the figures, as (name, value) rows."""
    subjects, runs = plan.setting.subjects, len(plan.batch.subjects)
    bases = dict.fromkeys(trial.row.base_model for trial in plan.trials)
    seeds = plan.batch.subjects[0].config
    return [
        ("setting", f"{plan.setting.name}: {counted(len(subjects), 'subject')} ({', '.join(subjects)})"),
        ("runs", f"{evaluated} of {runs} trained and measured; {len(plan.trials)} rows of a subject share them"),
        *(("base model", _describe_base(plan.usual[base])) for base in bases),
        (
            "samples",
            f"25 prompts, {counted(plan.setting.images_per_prompt, 'image')} each, seed {seeds.evaluation.seed}",
        ),
        ("training", f"seed {seeds.train.seed}"),
        ("encoders", f"bank {bank.name}, hash {bank.hash}"),
    ]


def _describe_base(plan: Plan) -> str:
    """The base model of a run that has no settings but the base's own."""
    sampling = plan.config.evaluation
    steps = " and ".join(str(stage.config.train.max_train_steps) for stage in plan.stages)
    hashes = " and ".join(stage.base.hash for stage in plan.stages)
    return (
        f"{plan.config.base_model}, hash {hashes}: {steps} steps of training where a table doesn't say otherwise, "
        f"{sampling.num_inference_steps} of sampling, guidance {sampling.guidance_scale:g}"
    )


def _evaluation(plan: Plan) -> dict[str, Any] | None:
    task = plan.protocol
    return None if task is None else find_evaluation(task)
