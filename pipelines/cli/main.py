"""The command group. Commands are thin (flags to settings) and import heavy libraries when called."""

import signal

import click

from dreambooth import __version__
from dreambooth.quiet import quiet
from pipelines.cli.batch import batch
from pipelines.cli.doctor import doctor
from pipelines.cli.endings import Commands
from pipelines.cli.evaluate import evaluate
from pipelines.cli.export import export
from pipelines.cli.families import families
from pipelines.cli.gc import gc
from pipelines.cli.generate import generate
from pipelines.cli.identifiers import identifiers
from pipelines.cli.jobs import jobs_group, submit
from pipelines.cli.manifest import manifest
from pipelines.cli.models import models
from pipelines.cli.paper import paper
from pipelines.cli.run import run
from pipelines.cli.serve import serve
from pipelines.cli.settings import settings
from pipelines.cli.study import study
from pipelines.cli.version import version
from pipelines.cluster.collector import collect_less_garbage
from pipelines.cluster.machine import settle


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Fine-tune text-to-image models on your subjects: DreamBooth on Ray, DeepSpeed and MLflow."""
    quiet()
    settle()
    collect_less_garbage()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops a command like Ctrl-C


for command in (
    run,
    batch,
    submit,
    jobs_group,
    manifest,
    doctor,
    generate,
    evaluate,
    export,
    study,
    serve,
    models,
    identifiers,
    settings,
    families,
    gc,
    paper,
    version,
):
    main.add_command(command)
