"""`dreambooth generate`: images of one finished model."""

from typing import Any

import click

from dreambooth.config.addresses import shown
from dreambooth.config.limits import LARGEST_SEED, LARGEST_SIDE, MOST_GUIDANCE, MOST_IMAGES, MOST_SAMPLING_STEPS
from pipelines.cli.given import Real
from pipelines.cli.options import graph_option, tracking_uri_option


@click.command()
@click.argument("prompt")
@click.option(
    "--model", required=True, help="Model: models:/NAME@latest, models:/NAME/3, a published prefix or a folder."
)
@click.option("--num", default=4, show_default=True, type=click.IntRange(1, MOST_IMAGES), help="Number of images.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, LARGEST_SEED),
    help="Seed of the first image; each further image adds 1.",
)
@click.option(
    "--steps",
    "num_inference_steps",
    type=click.IntRange(1, MOST_SAMPLING_STEPS),
    help="Sampling steps; default: the model's own.",
)
@click.option(
    "--guidance", "guidance_scale", type=Real(1, MOST_GUIDANCE), help="Guidance scale; default: the model's own."
)
@click.option("--height", type=click.IntRange(8, LARGEST_SIDE), help="Height in pixels, a multiple of 8.")
@click.option("--width", type=click.IntRange(8, LARGEST_SIDE), help="Width in pixels, a multiple of 8.")
@click.option("--output", default="generated", show_default=True, help="Folder or address of the images.")
@graph_option
@tracking_uri_option
def generate(prompt: str, model: str, tracking_uri: str | None, **options: Any) -> None:
    """Sample images of a personalized model. In PROMPT, [V] stands for the model's own identifier."""
    from pipelines.apps.generate import generate as generate_images

    result = generate_images(model, prompt, tracking_uri=tracking_uri, **options)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    for path in [*result.paths, result.contact_sheet]:
        click.echo(shown(path))
