"""`dreambooth study`: a blind comparison of two models by people."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dreambooth.amounts import counted
from dreambooth.config.limits import LARGEST_SEED
from dreambooth.errors import InputError
from pipelines.cli.options import tracking_uri_option

if TYPE_CHECKING:
    from pipelines.apps.study.store import StudyFile

_FILE = "study.sqlite"
_DEFAULT_OUTPUT = "output/study"


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="A B | STUDY")
@click.option("--report", "reporting", is_flag=True, help="Count the answers so far, write report.json, and stop.")
@click.option(
    "--questions", default=25, show_default=True, type=click.IntRange(1, 10_000), help="Number of questions, at most."
)
@click.option("--instance-images", metavar="DIR", help="Photographs to compare models with.")
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Prompt for models; default: the evaluation's."
)
@click.option(
    "--images-per-prompt",
    default=1,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Samples per prompt for models.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    # Further pictures have the following seeds.
    type=click.IntRange(0, LARGEST_SEED - 10**9),
    help="Random seed for pictures, sides and order.",
)
@click.option("--output", metavar="DIR", help=f"Folder of the study; default: {_DEFAULT_OUTPUT}.")
@click.option(
    "--port", default=8321, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 picks a free one."
)
@tracking_uri_option
def study(sources: tuple[str, ...], reporting: bool, output: str | None, port: int, **options: Any) -> None:
    """Ask people which of two models' pictures they prefer.

    A and B are models (models:/NAME@latest, a published model), folders of runs or batches, or evaluation.json files.
    The page, served to this machine alone, shows a picture of each in random order, and asks which shows the
    subject better and which follows the prompt better. Answers are stored at once; the same command, or the folder
    alone as STUDY, continues.
    """
    folder = _folder(sources, output)
    study_file = _open(folder / _FILE, sources, options)
    if reporting:
        _report(study_file, folder)
        return
    from pipelines.apps.study.server import StudyServer

    def answers() -> str:
        return counted(len(study_file.answers()), "answer")

    with StudyServer(study_file, port=port) as server:
        click.echo(f"{counted(study_file.count(), 'question')}, {answers()} so far, saved in {folder}")
        click.echo(f"open {server.url} in a browser; Ctrl-C ends it; 'dreambooth study {folder} --report' counts")
        try:
            server.wait()
        except KeyboardInterrupt:
            click.echo(f"\nstopped; {answers()} saved; run the same command again to continue")


def _folder(sources: tuple[str, ...], output: str | None) -> Path:
    """Folder of a study: STUDY, else --output."""
    if len(sources) > 2:
        raise InputError(f"a study compares two models, got {len(sources)}: {', '.join(sources)}")
    if len(sources) == 1 and output is not None:
        raise InputError(f"expected A and B with --output, or the folder of a study alone; got {sources[0]!r} alone")
    folder = sources[0] if len(sources) == 1 else output or _DEFAULT_OUTPUT
    if "://" in folder or folder.startswith("models:"):
        raise InputError(f"expected A and B, or a study's folder on this machine; got {folder!r}")
    return Path(folder).absolute()


def _open(path: Path, sources: tuple[str, ...], options: dict[str, Any]) -> "StudyFile":
    from pipelines.apps.study.make import StudySettings, open_study
    from pipelines.apps.study.store import StudyFile

    if len(sources) == 1:
        return StudyFile(path)
    tracking_uri = options.pop("tracking_uri")
    settings = StudySettings(a=sources[0], b=sources[1], **options)
    return open_study(path, settings, tracking_uri=tracking_uri, say=click.echo)


def _report(study_file: "StudyFile", folder: Path) -> None:
    from pipelines.apps.study.report import describe_report, report
    from pipelines.storage.files import write_json

    result = report(study_file.about, study_file.answers(), study_file.count())
    write_json(str(folder / "report.json"), result)
    for line in [*describe_report(result), str(folder / "report.json")]:
        click.echo(line)
