"""`dreambooth models`: registered models and their figures."""

import click

from pipelines.cli.options import tracking_uri_option

_FIGURES = (
    "dino",
    "clip_i",
    "dino_subject",
    "dino_subject_patches",
    "clip_t",
    "pres",
    "div",
    "dinov2",
    "dinov2_subject_patches",
    "dreamsim",
)
"""Figures with a column where a bank has measured them; --where knows all of them."""


@click.command()
@click.option(
    "--where", metavar="CONDITIONS", help="List only matching models, such as 'clip_t > 0.3 and class_noun = dog'."
)
@tracking_uri_option
def models(where: str | None, tracking_uri: str | None) -> None:
    """List the registered models and their figures.

    With --where, list the newest version of each matching model.

    Columns: subject, class noun, identifier, version, aliases, similarities, and figures by bank.
    """
    from rich.console import Console
    from rich.table import Table

    from pipelines.tracking.model_list import list_models

    found = list_models(tracking_uri, where)
    # Figures of different banks never share a column.
    judged = [
        (bank, name)
        for bank in sorted({bank for model in found for bank in model.figures})
        for name in _FIGURES
        if any(name in model.figures.get(bank, {}) for model in found)
    ]
    columns = [f"{bank}\n{name.replace('_', '-').upper()}" for bank, name in judged]
    described = ("model", "subject", "class noun", "[V]", "version", "aliases", "similarity", "class after")
    table = Table(*described, *columns, box=None)
    for model in found:
        figures = [model.similarity, model.class_after]
        figures += [model.figures.get(bank, {}).get(name) for bank, name in judged]
        shown = ("-" if figure is None else f"{figure:.2f}" for figure in figures)
        aliases = ", ".join(model.aliases) or "-"
        table.add_row(
            model.name, model.subject, model.class_noun, model.identifier, str(model.version), aliases, *shown
        )
    if not found:
        nothing = "no model is registered here yet; 'dreambooth run' makes one"
        click.echo(nothing if where is None else f"no registered model matches {where!r}")
        return
    # Long lines are better than unreadable columns.
    Console(width=Console(width=1000).measure(table).maximum).print(table)
