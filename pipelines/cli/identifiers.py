"""`dreambooth identifiers`: rare tokens of a base model."""

import click


@click.command()
@click.option(
    "--base-model",
    default="miniature",
    show_default=True,
    help="Built-in name, diffusers directory, hub id, or FILE.safetensors#MODEL.",
)
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(1, 100_000), help="Number of tokens to list."
)
@click.option("--check", metavar="WORD", help="Check this identifier: its tokens, and how common they are.")
def identifiers(base_model: str, revision: str | None, limit: int, check: str | None) -> None:
    """List rare tokens to use as an identifier, rarest first.

    They are tokens of the base model's own tokenizer, each with the reason why it is suitable.
    """
    from dreambooth.data.identifier import candidates, describe
    from dreambooth.models.base_model import resolve_base_model
    from dreambooth.models.families import load_tokenizer

    tokenizer = load_tokenizer(resolve_base_model(base_model, revision).directory)
    if check is not None:
        description = describe(tokenizer, check)
        click.echo(description.warning or f"{check!r} is a rare identifier")
        return
    for candidate in candidates(tokenizer, limit=limit):
        click.echo(f"{candidate.text:<8} {candidate.why}")
