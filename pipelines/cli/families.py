"""`dreambooth families`: families of base models, and what they take."""

import click


@click.command()
@click.option(
    "--markdown", is_flag=True, help="Print the page docs/families.md, which counts memory and takes minutes."
)
def families(markdown: bool) -> None:
    """List the families of base models that can be fine-tuned."""
    if markdown:
        from pipelines.cli.families_page import families_page

        click.echo(families_page(), nl=False)
        return
    from dreambooth.models.families import FAMILIES

    for family in FAMILIES:
        click.echo(f"{family.name:<28} {family.pipeline_class:<28} {', '.join(p.folder for p in family.components)}")
