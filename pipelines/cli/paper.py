"""`dreambooth paper`: reproduce the paper's tables on the miniatures."""

import sys
from typing import TYPE_CHECKING

import click

from pipelines.cli.endings import INCOMPLETE, INTERRUPTED
from pipelines.cli.options import overrides_option, quiet_option

if TYPE_CHECKING:
    from pipelines.apps.paper.paper import PaperResult


@click.command()
@click.option("--quick", is_flag=True, help="Two subjects and the paper's own tables only; takes minutes.")
@click.option("--table", "tables", multiple=True, help="Make only this table, such as table1; repeatable.")
@click.option("--output", default="output/paper", show_default=True, help="Folder or address of runs and page.")
@overrides_option
@click.option("--dry-run", is_flag=True, help="Check all runs, print the plan, and stop.")
@click.option("--page-only", is_flag=True, help="Train nothing; make the page from existing evaluations.")
@quiet_option
def paper(
    quick: bool,
    tables: tuple[str, ...],
    output: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    page_only: bool,
    silent: bool,
) -> None:
    """Run the paper's experiments on the miniatures.

    This trains what the paper's tables compare, and writes the tables and a page. Repeating the command does only
    what is missing. Exit code 0: all done, 3: some runs failed.
    """
    from pipelines.apps.paper.paper import plan_paper, run_paper, write_paper
    from pipelines.apps.paper.settings import full_setting, quick_setting, with_tables
    from pipelines.cluster.ray_cluster import local_resources, ray_cluster
    from pipelines.driver.batch_console import BatchView
    from pipelines.driver.console import RunConsole
    from pipelines.plan.batch_plan import describe_batch

    console = RunConsole(quiet=silent)
    setting = with_tables(quick_setting() if quick else full_setting(), tables)
    plan = plan_paper(setting, output, overrides, local_resources())
    console.table([*describe_batch(plan.batch), ("rows", f"{len(plan.trials)} of tables and subjects")])
    if dry_run:
        return
    if page_only:
        _print(write_paper(plan, failures={}))
        return
    with ray_cluster(plan.batch.cluster):
        try:
            with BatchView(total=len(plan.batch.subjects), quiet=silent) as view:
                result = run_paper(plan, view)
        except KeyboardInterrupt:
            click.echo("stopped at once; run the same command again to resume from the last checkpoints", err=True)
            sys.exit(INTERRUPTED)
    _print(result)
    if result.interrupted:
        click.echo("stopped after writing checkpoints; run the same command again to resume from them", err=True)
        sys.exit(INTERRUPTED)
    sys.exit(INCOMPLETE if result.failures else 0)


def _print(result: "PaperResult") -> None:
    for table in result.tables:
        for finding in table.findings:
            click.echo(finding.sentence)
    rows = [("failed", f"{name}: {reason}") for name, reason in result.failures.items()]
    for what, value in [*rows, ("page", result.page), ("tables", result.records)]:
        click.echo(f"{what:>14}  {value}")
