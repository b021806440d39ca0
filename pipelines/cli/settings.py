"""`dreambooth settings`: all settings with defaults and meanings."""

import click


@click.command()
@click.argument("section", required=False)
@click.option("--markdown", is_flag=True, help="Print the page docs/settings.md.")
def settings(section: str | None, markdown: bool) -> None:
    """List all settings with defaults and meanings.

    SECTION limits the list to a section or one setting, such as train or train.seed.
    """
    from dreambooth.config.explain import in_yaml, list_settings
    from dreambooth.config.miniatures import other_defaults
    from dreambooth.config.settings import DreamBoothConfig

    if markdown:
        from pipelines.cli.settings_page import settings_page

        click.echo(settings_page(), nl=False)
        return
    rows = list_settings(DreamBoothConfig)
    for name, default, description in rows if section is None else _of(section, rows):
        others = "; ".join(
            f"{', '.join(bases)}: {value}" for value, bases in other_defaults(name, default, in_yaml).items()
        )
        shown = f"{default} ({others})" if others else default
        for line in _wrapped(f"{name} = {shown}" if shown else f"{name} =", indent=0, hanging=8):
            click.echo(line)
        for line in _wrapped(description, indent=4, hanging=4):
            click.echo(line)


def _of(section: str, rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The rows of a section, or the one of a setting. Raises InputError for another word."""
    from dreambooth.config.explain import nearest_setting
    from dreambooth.errors import InputError

    found = [row for row in rows if f"{row[0]}.".startswith(f"{section}.")]
    if not found:
        names = [name for name, _, _ in rows]
        nearest = nearest_setting(section, names)
        sections = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names if "." in name))
        hint = f"did you mean {nearest}? " if nearest else ""
        raise InputError(f"no setting or section is named {section!r}; {hint}The sections are {sections}")
    return found


def _wrapped(text: str, *, indent: int, hanging: int) -> list[str]:
    """Lines no wider than the terminal, or 80 columns where there is none; long addresses are left whole."""
    import shutil
    import textwrap

    width = min(shutil.get_terminal_size().columns, 110)
    return textwrap.wrap(
        text,
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
