"""`dreambooth run`: one subject, end to end."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import yaml

from pipelines.cli.command import this_command
from pipelines.cli.endings import INCOMPLETE, INTERRUPTED
from pipelines.cli.options import address_option, overrides_option, quiet_option

if TYPE_CHECKING:
    from dreambooth.config.settings import DreamBoothConfig
    from pipelines.driver.console import RunConsole


@click.command()
@click.argument("config", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--images", help="Folder, glob or address of the instance images.")
@click.option("--class-noun", help="Kind of subject: dog, backpack, ...")
@click.option("--name", help="Name of the subject; default: the images' folder name.")
@click.option("--identifier", help="Rare token that names the subject; default: chosen automatically.")
@click.option("--base-model", help="Built-in name, diffusers directory, hub id, or FILE.safetensors[#MODEL].")
@click.option("--steps", type=int, help="Training steps (train.max_train_steps).")
@click.option("--workers", type=int, help="Workers that train the subject together (cluster.num_workers).")
@click.option("--zero-stage", type=int, help="DeepSpeed's ZeRO stage, 0 to 3 (zero.stage).")
@click.option("--output", help="Folder of this run (storage.run).")
@address_option
@overrides_option
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, and stop.")
@click.option("--verbose", is_flag=True, help="With --dry-run: also print all settings, as YAML for CONFIG.")
@quiet_option
def run(
    config: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    verbose: bool,
    silent: bool,
    **flags: str | int | None,
) -> None:
    """Personalize one subject and register its model.

    Stages: class images, fine-tuning, evaluation, registration. CONFIG is a YAML file; flags override it, --set
    overrides flags. Repeating the command does only what is missing: an interrupted run resumes from its last
    checkpoint. Exit code 0: all done, 3: the model is published, but MLflow was unreachable and lacks part of the
    result.
    """
    settings = _settings(config, flags, overrides)
    from pipelines.driver.console import RunConsole

    if dry_run:
        _dry_run(settings, RunConsole(quiet=silent), verbose=verbose)
        return
    from pipelines.driver.personalize import personalize

    console = RunConsole(quiet=silent)
    try:
        result = personalize(settings, console)
    except KeyboardInterrupt:
        click.echo("interrupted; run the same command again to resume from the last checkpoint", err=True)
        sys.exit(INTERRUPTED)
    from pipelines.driver.summary import describe_result  # imports MLflow

    for what, value in describe_result(result):
        click.echo(f"{what:>14}  {value}")
    if result.error is not None:
        click.echo(f"{'to complete':>14}  {this_command()}")
        sys.exit(INCOMPLETE)


def _settings(
    config: Path | None, flags: dict[str, str | int | None], overrides: tuple[str, ...]
) -> "DreamBoothConfig":
    from dreambooth.config.overrides import merge, nest, parse_override, read_yaml
    from dreambooth.config.settings import load_config
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
    _check_described(settings.get("subject", {}))
    return load_config(settings)


def _check_described(subject: object) -> None:
    """Raise InputError with the flag of each required setting of the subject that is absent."""
    from dreambooth.errors import InputError

    flags = {"instance_images": "--images photos/rex", "class_noun": "--class-noun dog"}
    lines = [
        f"subject.{name} is missing; give it as in {example}"
        for name, example in flags.items()
        if isinstance(subject, dict) and name not in subject
    ]
    if lines:
        raise InputError("\n".join(lines))


def _dry_run(config: "DreamBoothConfig", console: "RunConsole", *, verbose: bool) -> None:
    from pipelines.driver import personalize
    from pipelines.plan.capacity import describe_capacity
    from pipelines.plan.describe import describe_plan, printable_settings
    from pipelines.plan.estimate import describe_estimate
    from pipelines.plan.host_memory import describe_host_memory

    plan = personalize.dry_run(config, console)
    for warning in plan.warnings:
        console.warn(warning)
    if not console.quiet:  # memory takes seconds
        # A base without its weights is planned for other machines.
        estimate = describe_estimate([plan], lanes=1) if plan.has_weights else []
        console.table([*describe_plan(plan), *estimate, describe_host_memory([plan], ()), *describe_capacity(plan)])
    if verbose:
        click.echo(yaml.safe_dump(printable_settings(plan.config), sort_keys=False, width=110), nl=False)
