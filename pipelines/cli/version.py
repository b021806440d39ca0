"""`dreambooth version`: what a bug report needs."""

import click


@click.command()
def version() -> None:
    """Print versions, system and devices for a bug report."""
    from pipelines.plan.here import describe_here

    rows = describe_here()
    width = max(map(len, rows))
    for what, found in rows.items():
        click.echo(f"{what:<{width}}  {found}")
