"""`dreambooth gc`: delete leftovers of failed uploads."""

import click

from dreambooth.amounts import counted
from dreambooth.config.addresses import shown
from pipelines.cli.given import Real


@click.command()
@click.argument("address", default="output")
@click.option("--older-than", default=24.0, show_default=True, type=Real(0, 876_000), help="Minimum age in hours.")
@click.option("--dry-run", is_flag=True, help="List leftovers without deleting them.")
def gc(address: str, older_than: float, dry_run: bool) -> None:
    """Delete leftovers of failed uploads under ADDRESS.

    These are publications and checkpoints without a manifest.
    """
    import datetime

    from pipelines.apps.garbage import find_leftovers, remove_leftovers

    leftovers = find_leftovers(address, older_than=datetime.timedelta(hours=older_than))
    for leftover in leftovers:
        click.echo(f"{leftover.size / 2**20:8.1f} MiB  begun {leftover.begun:%Y-%m-%d %H:%M}  {shown(leftover.uri)}")
    if not dry_run:
        remove_leftovers(leftovers)
    click.echo(f"{counted(len(leftovers), 'leftover')} {'found' if dry_run else 'removed'}")
