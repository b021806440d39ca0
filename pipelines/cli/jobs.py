"""`dreambooth submit` and `dreambooth jobs`: run on a Ray cluster from outside."""

import sys

import click

from pipelines.cli.endings import INTERRUPTED

_ADDRESS = click.option("--address", help="The cluster's dashboard, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS.")


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
@click.argument("command", type=click.Choice(["run", "batch"]))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@_ADDRESS
@click.option("--detach", is_flag=True, help="Don't follow the log.")
@click.option("--image-has-package", is_flag=True, help="Use the dreambooth of the cluster's image; upload no code.")
@click.option("--env", "variables", multiple=True, metavar="NAME", help="Environment variable to pass to the job.")
def submit(
    command: str,
    arguments: tuple[str, ...],
    address: str | None,
    detach: bool,
    image_has_package: bool,
    variables: tuple[str, ...],
) -> None:
    """Submit a run or a batch to a Ray cluster and follow it.

    ARGUMENTS are those of `dreambooth run` or `dreambooth batch`. Repeating the command finds the same job; a stopped
    or failed one resumes from its last checkpoints. Results must be readable for the cluster and for you: --set
    storage.root=s3://…
    """
    from pipelines.driver import jobs

    values = jobs.environment(variables)
    job = jobs.make_job(command, arguments)
    if not job.stored and not any("://" in word for word in job.arguments[1:2]):  # a remote configuration may set it
        click.echo("warning: results go to a folder on the cluster's head; set storage.root=s3://…", err=True)
    client = jobs.connect(address)
    job_id, fate = jobs.submit(client, job, with_code=not image_has_package, variables=values)
    click.echo(f"{job_id}: {fate}", err=True)
    if detach or fate == "already done":
        click.echo(job_id)
        return
    _follow(client, job_id)


@click.group(name="jobs")
def jobs_group() -> None:
    """List, follow and stop jobs on a Ray cluster."""


@jobs_group.command(name="list")
@_ADDRESS
def list_jobs(address: str | None) -> None:
    """List jobs, newest last."""
    from pipelines.driver import jobs

    ours = [info for info in jobs.connect(address).list_jobs() if (info.submission_id or "").startswith("dreambooth-")]
    for info in sorted(ours, key=lambda info: info.start_time or 0):
        click.echo(f"{info.submission_id}  {info.status.value:<9}  {(info.metadata or {}).get('dreambooth', '')}")


@jobs_group.command()
@click.argument("job")
@_ADDRESS
def logs(job: str, address: str | None) -> None:
    """Follow a job's log until it ends."""
    from pipelines.driver import jobs

    client = jobs.connect(address)
    jobs.status(client, job)
    _follow(client, job)


@jobs_group.command()
@click.argument("job")
@_ADDRESS
def status(job: str, address: str | None) -> None:
    """Print a job's status."""
    from pipelines.driver import jobs

    click.echo(jobs.status(jobs.connect(address), job))


@jobs_group.command()
@click.argument("job")
@_ADDRESS
def stop(job: str, address: str | None) -> None:
    """Stop a job; submitting it again resumes from its checkpoints."""
    from pipelines.driver import jobs

    client = jobs.connect(address)
    jobs.status(client, job)
    client.stop_job(job)
    click.echo("stopping; submit it again to resume")


def _follow(client: object, job: str) -> None:
    from pipelines.driver import jobs
    from pipelines.driver.relayed_view import Replay

    try:
        with Replay(lambda line: click.echo(line, nl=False)) as replay:
            ended = jobs.follow(client, job, replay.feed)
    except KeyboardInterrupt:
        click.echo(
            f"\nthe job continues; 'dreambooth jobs logs {job}' shows its log, 'jobs stop {job}' stops it", err=True
        )
        sys.exit(INTERRUPTED)
    click.echo(f"{job}: {ended}", err=True)
    sys.exit(jobs.exit_code(client, job))
