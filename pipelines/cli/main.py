"""The command line: turns flags into settings and prints results; heavy imports happen inside the commands."""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from dreambooth import __version__
from dreambooth.config.addresses import shown
from dreambooth.config.limits import LARGEST_SEED, LARGEST_SIDE, MOST_GUIDANCE, MOST_IMAGES, MOST_SAMPLING_STEPS
from dreambooth.quiet import quiet
from pipelines.cli.batch import batch
from pipelines.cli.command import this_command
from pipelines.cli.doctor import doctor
from pipelines.cli.endings import INTERRUPTED, Commands
from pipelines.cli.evaluate import evaluate
from pipelines.cli.given import Real
from pipelines.cli.jobs import jobs_group, submit
from pipelines.cli.manifest import manifest
from pipelines.cli.paper import paper
from pipelines.cli.serve import serve
from pipelines.cli.study import study
from pipelines.cluster.collector import collect_less_garbage
from pipelines.cluster.machine import settle

if TYPE_CHECKING:
    from dreambooth.config.settings import DreamBoothConfig

INCOMPLETE = 3
_WIDE = 1000


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Fine-tune text-to-image models on your subjects: DreamBooth on Ray, DeepSpeed and MLflow."""
    quiet()
    settle()
    collect_less_garbage()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops a command like Ctrl-C


_SET = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Any setting; 'dreambooth settings' lists them."
)


@main.command()
@click.argument("config", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--images", help="Folder, glob or address of the instance images.")
@click.option("--class-noun", help="Class noun of the subject: dog, backpack, ...")
@click.option("--name", help="Name of the subject; default: the name of the images' folder.")
@click.option("--identifier", help="Rare token that names the subject; default: choose one.")
@click.option("--base-model", help="Base model: miniature, a diffusers directory at any address, or a hub id.")
@click.option("--steps", type=int, help="Training steps (train.max_train_steps).")
@click.option("--workers", type=int, help="Workers that train together (cluster.num_workers).")
@click.option("--zero-stage", type=int, help="ZeRO stage (zero.stage).")
@click.option("--output", help="Folder of this run (storage.run).")
@click.option("--address", help="cluster.address: Ray cluster to join, 'auto' or an address; default: start one here.")
@_SET
@click.option("--dry-run", is_flag=True, help="Check everything, print the configuration and the plan, and stop.")
@click.option("--quiet", "silent", is_flag=True, help="Print only warnings and the result.")
def run(
    config: Path | None, overrides: tuple[str, ...], dry_run: bool, silent: bool, **flags: str | int | None
) -> None:
    """Personalize one subject: class images, fine-tuning, evaluation, registration.

    CONFIG is a YAML file; flags override it, --set overrides flags. The same command again does only what is missing:
    an interrupted run resumes from its last checkpoint. Exit code 0: all done, 3: the model is published, but MLflow
    was unreachable and lacks some of it.
    """
    settings = _settings(config, flags, overrides)
    from pipelines.driver.console import RunConsole

    if dry_run:
        _dry_run(settings, RunConsole(quiet=silent))
        return
    from pipelines.driver.personalize import personalize
    from pipelines.driver.summary import describe_result

    console = RunConsole(quiet=silent)
    try:
        result = personalize(settings, console)
    except KeyboardInterrupt:
        click.echo("interrupted; the same command goes on from the last checkpoint", err=True)
        sys.exit(INTERRUPTED)
    for what, value in describe_result(result):
        click.echo(f"{what:>14}  {value}")
    if result.error is not None:
        click.echo(f"{'to complete':>14}  {this_command()}")
        sys.exit(INCOMPLETE)


def _settings(
    config: Path | None, flags: dict[str, str | int | None], overrides: tuple[str, ...]
) -> "DreamBoothConfig":
    from dreambooth.config.settings import load_config, merge, nest, parse_override, read_yaml
    from dreambooth.config.subject import as_tuple
    from pipelines.plan.subject_list import settings_beside

    settings = read_yaml(config) if config is not None else {}
    places = {
        "images": "subject.instance_images",
        "class_noun": "subject.class_noun",
        "name": "subject.name",
        "identifier": "subject.identifier",
        "base_model": "base_model",
        "steps": "train.max_train_steps",
        "workers": "cluster.num_workers",
        "zero_stage": "zero.stage",
        "output": "storage.run",
        "address": "cluster.address",
    }
    given = nest((place, flags[flag]) for flag, place in places.items() if flags[flag] is not None)
    for over in (given, *map(parse_override, overrides)):
        settings = merge(settings, over)
    subject = settings.get("subject")
    images = as_tuple(subject.get("instance_images")) if isinstance(subject, dict) else None
    if isinstance(images, list | tuple) and images and all(type(image) is str and image.strip() for image in images):
        settings = merge(settings_beside(images), settings)
    return load_config(settings)


def _dry_run(config: "DreamBoothConfig", console: Any) -> None:
    from pipelines.cluster.ray_cluster import ray_cluster
    from pipelines.driver.personalize import checked_plan
    from pipelines.plan.memory import describe_peak
    from pipelines.plan.run_plan import describe_plan, printable_settings
    from pipelines.stages.evaluate_stage import image_encoder

    if config.cluster.address is None:
        plan = checked_plan(config)
    else:
        with ray_cluster(config.cluster) as resources:
            plan = checked_plan(config, resources)
    if plan.config.evaluation.image_encoder is not None:
        image_encoder(plan.config)
    click.echo(yaml.safe_dump(printable_settings(plan.config), sort_keys=False, width=110), nl=False)
    for warning in plan.warnings:
        console.warn(warning)
    console.table([*describe_plan(plan), describe_peak([plan])])


@main.command()
@click.argument("prompt")
@click.option(
    "--model",
    required=True,
    help="Model: models:/NAME@latest, models:/NAME/3, the address of a published one, or a folder.",
)
@click.option("--num", default=4, show_default=True, type=click.IntRange(1, MOST_IMAGES), help="Number of images.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, LARGEST_SEED),
    help="Seed of the first image; the next have the next seeds.",
)
@click.option(
    "--steps",
    "num_inference_steps",
    type=click.IntRange(1, MOST_SAMPLING_STEPS),
    help="Sampling steps; default: the model's own.",
)
@click.option(
    "--guidance",
    "guidance_scale",
    type=Real(1, MOST_GUIDANCE),
    help="Classifier-free guidance; default: the model's own.",
)
@click.option("--height", type=click.IntRange(8, LARGEST_SIDE), help="Height in pixels, a multiple of 8.")
@click.option("--width", type=click.IntRange(8, LARGEST_SIDE), help="Width in pixels, a multiple of 8.")
@click.option("--output", default="generated", show_default=True, help="Folder or address of the images.")
@click.option("--tracking-uri", help="MLflow's address; default: sqlite:///mlflow.db here.")
def generate(prompt: str, model: str, tracking_uri: str | None, **options: Any) -> None:
    """Sample images of a personalized model. In PROMPT, [V] stands for the model's own identifier."""
    from pipelines.apps.generate import generate as generate_images

    result = generate_images(model, prompt, tracking_uri=tracking_uri, **options)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    for path in [*result.paths, result.contact_sheet]:
        click.echo(shown(path))


@main.command()
@click.option("--base-model", default="miniature", show_default=True)
@click.option("--revision")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 100_000))
@click.option("--check", metavar="WORD", help="Show the tokens of this identifier and how common they are.")
def identifiers(base_model: str, revision: str | None, limit: int, check: str | None) -> None:
    """List rare tokens of a base model's tokenizer for use as identifiers, rarest first."""
    from dreambooth.data.identifier import candidates, describe
    from dreambooth.models.base_model import resolve_base_model
    from dreambooth.models.families.stable_diffusion import load_tokenizer

    tokenizer = load_tokenizer(resolve_base_model(base_model, revision).directory)
    if check is not None:
        description = describe(tokenizer, check)
        click.echo(description.warning or f"{check!r} is a rare identifier")
        return
    for candidate in candidates(tokenizer, limit=limit):
        click.echo(f"{candidate.text:<8} {candidate.why}")


@main.command()
@click.argument("address", default="output")
@click.option("--older-than", default=24.0, show_default=True, type=Real(0, 876_000), help="Minimum age in hours.")
@click.option("--dry-run", is_flag=True, help="List, but remove nothing.")
def gc(address: str, older_than: float, dry_run: bool) -> None:
    """Remove leftovers of failed attempts below ADDRESS: publications and checkpoints without a manifest."""
    import datetime

    from pipelines.apps.garbage import find_leftovers, remove_leftovers

    leftovers = find_leftovers(address, older_than=datetime.timedelta(hours=older_than))
    for leftover in leftovers:
        click.echo(f"{leftover.size / 2**20:8.1f} MiB  begun {leftover.begun:%Y-%m-%d %H:%M}  {shown(leftover.uri)}")
    if not dry_run:
        remove_leftovers(leftovers)
    click.echo(f"{len(leftovers)} leftover{'s' * (len(leftovers) != 1)} {'found' if dry_run else 'removed'}")


@main.command()
@click.option("--tracking-uri", help="MLflow's address; default: sqlite:///mlflow.db here.")
def models(tracking_uri: str | None) -> None:
    """List the registered models: subject, class noun, identifier, version, aliases, similarities, figures by bank."""
    from rich.console import Console
    from rich.table import Table

    from pipelines.tracking.registry import list_models

    found = list_models(tracking_uri)
    # Figures of different banks never share a column.
    judged = [
        (bank, name)
        for bank in sorted({bank for model in found for bank in model.figures})
        for name in ("dino", "clip_i", "clip_t", "pres", "div")
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
        click.echo("no model is registered here yet; 'dreambooth run' makes one")
        return
    # Long lines are better than unreadable columns.
    Console(width=Console(width=_WIDE).measure(table).maximum).print(table)


@main.command()
@click.option("--markdown", is_flag=True, help="Print the page docs/settings.md.")
def settings(markdown: bool) -> None:
    """List all settings with defaults and descriptions."""
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


for command in (batch, doctor, evaluate, paper, serve, submit, jobs_group, manifest, study):
    main.add_command(command)

if __name__ == "__main__":
    main()
