"""`dreambooth batch`: many subjects with one command."""

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from dreambooth.amounts import counted
from dreambooth.errors import InputError
from pipelines.cli.command import this_command
from pipelines.cli.endings import INCOMPLETE, INTERRUPTED
from pipelines.cli.options import address_option, overrides_option, quiet_option

if TYPE_CHECKING:
    from pipelines.driver.console import RunConsole
    from pipelines.plan.batch_plan import BatchPlan

_SHOWN_WARNINGS = 12


@click.command()
@click.argument("subjects")
@overrides_option
@address_option
@click.option("--name", help="Name of the batch; default: the name of SUBJECTS.")
@click.option("--dry-run", is_flag=True, help="Check all subjects, print the plan, and stop.")
@click.option("--skip-invalid", is_flag=True, help="Skip subjects that can't be trained.")
@quiet_option
def batch(
    subjects: str,
    overrides: tuple[str, ...],
    address: str | None,
    name: str | None,
    dry_run: bool,
    skip_invalid: bool,
    silent: bool,
) -> None:
    """Personalize many subjects through warm workers.

    SUBJECTS is a table (.yaml, .jsonl, .csv) or a folder of folders, at any address. Class images are made once per
    class, and one report has all results. Repeating the command does only what is missing. Exit code 0: all done,
    3: subjects failed, or are published but not in MLflow.
    """
    from pipelines.cluster.ray_cluster import local_resources, ray_cluster, ray_cluster_meanwhile
    from pipelines.driver.batch_console import checks_table
    from pipelines.driver.console import RunConsole
    from pipelines.plan.batch_plan import describe_batch, make_batch_plan
    from pipelines.plan.inspections import known_inspections, remember_inspections
    from pipelines.plan.subject_checks import check_subjects, valid_plans
    from pipelines.plan.subject_list import read_batch

    console = RunConsole(quiet=silent)
    name = _checked_name(name) if name is not None else batch_name(subjects)
    listed = read_batch(subjects, (*overrides, *([f"cluster.address={address}"] if address else [])))
    first = next((subject.config for subject in listed if subject.config is not None), None)
    cluster = first.cluster if first is not None else None
    with ExitStack() as stack:
        # Start Ray only if there is something to train.
        joined = stack.enter_context(ray_cluster(cluster)) if cluster is not None and cluster.address else None
        resources = joined or local_resources()
        if cluster is not None:
            resources.check(cluster)  # once, not per subject
        checks = check_subjects(
            listed, resources, known_inspections(first.storage.root, name) if first is not None else {}
        )
        if not silent or any(check.errors or check.warnings for check in checks):
            console.findings(checks_table(checks))
        plan = make_batch_plan(name, valid_plans(checks, skip_invalid=skip_invalid), resources)
        if joined is None and not dry_run:
            ready = stack.enter_context(ray_cluster_meanwhile(plan.cluster))
        from pipelines.driver.personalize import check_batch_destinations  # imports MLflow, while Ray starts

        check_batch_destinations(plan)
        if not silent:  # an estimate takes seconds
            from pipelines.plan.estimate import describe_estimate

            estimate = describe_estimate(plan.subjects, plan.lanes, lanes_per_gpu=plan.lanes_per_gpu)
            console.table([*describe_batch(plan), *estimate])
        if dry_run:
            return
        found = {check.name: check.found for check in checks if check.found}
        remember_inspections(plan.subjects[0].config.storage.root, name, found)
        del listed, checks, found  # which hold settings and findings of thousands
        if joined is None:
            ready()
        _run(plan, console, silent=silent)


def _run(plan: "BatchPlan", console: "RunConsole", *, silent: bool) -> None:
    from pipelines.driver.batch import run_batch
    from pipelines.driver.batch_console import BatchView
    from pipelines.driver.personalize import encoder_of
    from pipelines.driver.relay import relays
    from pipelines.driver.relayed_view import RelayedBatchView

    kind = RelayedBatchView if relays() and not silent else BatchView
    encoder = encoder_of(plan.subjects[0], console)
    try:
        with kind(total=len(plan.subjects), quiet=silent) as view:
            outcome = run_batch(plan, view, encoder)
    except KeyboardInterrupt:
        click.echo("stopped at once; run the same command again to resume from the last checkpoints", err=True)
        sys.exit(INTERRUPTED)
    _print_outcome(outcome.summary)
    if outcome.interrupted:
        click.echo("stopped after writing checkpoints; run the same command again to resume from them", err=True)
        sys.exit(INTERRUPTED)
    sys.exit(INCOMPLETE if outcome.failed or outcome.summary["untracked"] else 0)


def _checked_name(name: str) -> str:
    from dreambooth.config.subject import check_name

    try:
        return check_name(name)
    except ValueError as error:
        raise InputError(f"--name: {error}") from None


def batch_name(subjects: str) -> str:
    """Name a batch after its table or folder: `photos/My Dogs/` gives my-dogs."""
    from dreambooth.config.addresses import named_place
    from dreambooth.config.subject import name_from
    from pipelines.plan.tables import TABLES

    stem = named_place(subjects).rstrip("/").rsplit("/", 1)[-1]
    stem = next((stem[: -len(end)] for end in TABLES if stem.lower().endswith(end)), stem)
    return name_from(stem) or "batch"


def _print_outcome(summary: dict[str, Any]) -> None:
    counts = summary["subjects"]
    states = ", ".join(f"{counts[state]} {state}" for state in counts if state != "total" and counts[state])
    rows = [("subjects", f"{counts['total']}: {states}")]
    rows += [("failed", f"{name}: {reason}") for name, reason in summary["failures"].items()]
    warned = [f"{name}: {warning}" for name, warnings in summary["warnings"].items() for warning in warnings]
    rows += [("warning", warning) for warning in warned[:_SHOWN_WARNINGS]]
    if len(warned) > _SHOWN_WARNINGS:
        rows.append(("", f"{counted(len(warned) - _SHOWN_WARNINGS, 'more warning')} in the report"))
    if (reason := summary["untracked"]) is not None:
        lacks = (
            f"MLflow lacks {counted(counts['trained'], 'published subject')}"
            if counts["trained"]
            else "MLflow lacks figures"
        )
        rows += [("not complete", f"{lacks} of this batch ({reason})"), ("to complete", this_command())]
    rows += [("report", summary["report"]), ("MLflow", summary["mlflow"]["look"])]
    for what, value in rows:
        click.echo(f"{what:>14}  {value}")
