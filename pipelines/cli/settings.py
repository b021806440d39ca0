"""`dreambooth settings`: all settings with defaults and meanings."""

import click


@click.command()
@click.option("--markdown", is_flag=True, help="Print the page docs/settings.md.")
def settings(markdown: bool) -> None:
    """List all settings with defaults and meanings."""
    from dreambooth.config.explain import list_settings
    from dreambooth.config.settings import MINIATURE, DreamBoothConfig

    if markdown:
        from pipelines.cli.settings_page import settings_page

        click.echo(settings_page(), nl=False)
        return
    for name, default, description in list_settings(DreamBoothConfig):
        click.echo(f"{name:<38} {default:<12} {description}".rstrip())
    click.echo("\nWith base_model miniature these are the defaults instead:\n")
    for group, values in MINIATURE.items():
        for name, value in values.items():
            click.echo(f"{group + '.' + name:<38} {value}")
