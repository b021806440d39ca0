"""`dreambooth export`: a finished model in the forms that other programs read."""

from typing import TYPE_CHECKING, Any

import click

from dreambooth.config.addresses import shown
from pipelines.cli.given import Real
from pipelines.cli.options import overrides_option, tracking_uri_option

if TYPE_CHECKING:
    from pipelines.apps.export.exporting import Exported


class Rank(click.ParamType["int | None"]):
    """A whole number, or `auto`."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """A number, None for `auto`."""
        return None if value in (None, "auto") else int(click.IntRange(1, 1024).convert(value, param, ctx))


@click.command()
@click.argument("model")
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(["single-file", "lora", "diffusers"]),
    help="Output format: one file for ComfyUI and AUTOMATIC1111, a LoRA on the base model, or diffusers' folder.",
)
@click.option("--to", help="Address to write the file (.safetensors) or, for diffusers, the folder to.")
@click.option(
    "--push-to", metavar="hub:NAME", help="Hub repository to push the model and its card to, instead of --to."
)
@click.option("--public", is_flag=True, help="Make the repository public; default: private.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    help="Precision of the exported weights; auto: as stored, float32 for a LoRA.",
)
@click.option(
    "--ema/--no-ema",
    default=None,
    help="Moving average of the weights, or the last step's, if the run kept them (train.keep_unaveraged); "
    "default: as published.",
)
@click.option(
    "--rank", default="auto", show_default=True, type=Rank(), help="Rank of the LoRA; auto measures which is enough."
)
@click.option(
    "--within",
    default=0.02,
    show_default=True,
    type=Real(0, 2),
    help="Largest loss of DINO and CLIP-T that --rank auto accepts.",
)
@click.option(
    "--names",
    default="diffusers",
    show_default=True,
    type=click.Choice(["diffusers", "kohya"]),
    help="Naming scheme of the LoRA's tensors.",
)
@click.option("--instance-images", help="Folder, glob or address of the subject's images, for --rank auto.")
@overrides_option
@tracking_uri_option
@click.option("--quiet", "silent", is_flag=True, help="Print only the result.")
def export(
    model: str,
    form: Any,
    to: str | None,
    push_to: str | None,
    public: bool,
    dtype: str,
    ema: bool | None,
    tracking_uri: str | None,
    silent: bool,
    **lora: Any,
) -> None:
    """Write a personalized model for other programs or to the hub.

    MODEL is models:/NAME@ALIAS, or the address of a publication. Each file is printed with its sha256.
    """
    from pipelines.apps.export.exporting import Exported, export_whole
    from pipelines.apps.export.lora import export_lora
    from pipelines.driver.console import RunConsole

    if (to is None) == (push_to is None):
        raise click.UsageError("give one of --to and --push-to")
    if public and push_to is None:
        raise click.UsageError("--public goes with --push-to")
    console = RunConsole(quiet=silent)

    def written(address: str) -> Exported:
        shared: dict[str, Any] = {"dtype": dtype, "ema": ema, "tracking_uri": tracking_uri, "console": console}
        if form == "lora":
            return export_lora(model, address, **shared, **lora)
        return export_whole(model, address, form=form, **shared)

    if push_to is not None:
        from pipelines.apps.export.push import export_and_push

        result, pushed = export_and_push(
            model, push_to, written, form=form, public=public, ema=ema, tracking_uri=tracking_uri, console=console
        )
        _print(result, files=False)
        for name, size in pushed.files:
            click.echo(f"{size:>13}  {name}")
        click.echo(f"{'public' if pushed.public else 'private'}  {shown(pushed.commit_url)}")
    elif to is not None:
        _print(written(to))


def _print(result: "Exported", *, files: bool = True) -> None:
    """The curve of a rank that was measured, notes, and the files with their sha256."""
    if (curve := result.curve) is not None:
        click.echo(f"{'rank':>6}  {'MB':>9}  {'DINO':>6}  {'CLIP-T':>6}  {'loss':>6}")
        for point in (*curve.points, curve.whole):
            name = point.rank or "whole"
            chosen = "  <- chosen" if point.rank == curve.rank else ""
            figures = f"{point.dino:6.3f}  {point.clip_t:6.3f}  {curve.loss(point):6.3f}"
            click.echo(f"{name:>6}  {point.size / 1e6:9.1f}  {figures}{chosen}")
    for note in result.notes:
        click.echo(note)
    for file in result.files if files else ():
        click.echo(f"{file.sha256}  {shown(file.address)}")
