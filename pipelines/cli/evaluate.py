"""`dreambooth evaluate`: measure one model by the paper's figures."""

import click

from pipelines.cli.options import overrides_option, tracking_uri_option

_SHOWN = {
    "dino": "DINO",
    "clip_i": "CLIP-I",
    "dino_subject": "DINO, subject",
    "dino_subject_patches": "DINO, patches",
    "clip_t": "CLIP-T",
    "clip_t_base": "CLIP-T, base",
    "pres": "PRES",
    "div": "DIV",
    "real_dino": "DINO, real",
    "real_clip_i": "CLIP-I, real",
    "near_copies": "near-copies",
    "dinov2": "DINOv2",
    "dinov2_subject_patches": "DINOv2, patches",
    "real_dinov2": "DINOv2, real",
    "dreamsim": "DreamSim",
    "real_dreamsim": "DreamSim, real",
}


@click.command()
@click.option(
    "--model", required=True, help="Model: models:/NAME@latest, models:/NAME/3, or the address of a published one."
)
@click.option("--instance-images", required=True, help="Folder, glob or address of the subject's images.")
@click.option(
    "--prompts",
    default="auto",
    show_default=True,
    help="Prompts: auto, dreambench, miniature, or a text file, one per line, with [V] and {class_noun}.",
)
@click.option(
    "--images-per-prompt", type=click.IntRange(1, 10_000), help="Images per prompt (evaluation.images_per_prompt)."
)
@click.option(
    "--bank", type=click.Choice(["auto", "paper", "miniature"]), help="Encoders to measure with (evaluation.bank)."
)
@overrides_option
@click.option("--force", is_flag=True, help="Make it the champion regardless of its figures.")
@tracking_uri_option
@click.option("--quiet", "silent", is_flag=True, help="Print only the result.")
def evaluate(
    model: str,
    instance_images: str,
    prompts: str,
    images_per_prompt: int | None,
    bank: str | None,
    overrides: tuple[str, ...],
    force: bool,
    tracking_uri: str | None,
    silent: bool,
) -> None:
    """Measure a model as in the DreamBooth paper.

    The figures are DINO, CLIP-I, CLIP-T, PRES and DIV, with intervals. They go to MLflow, to the model's version, and
    beside the model as evaluation.json. The alias 'champion' moves to the version if it passes the gate (gate.*).
    """
    from dreambooth.evaluation.figures import by_bank
    from pipelines.apps.evaluate_model import evaluate_model
    from pipelines.driver.console import RunConsole

    flags = {"evaluation.images_per_prompt": images_per_prompt, "evaluation.bank": bank}
    given = tuple(f"{name}={value}" for name, value in flags.items() if value is not None)
    result = evaluate_model(
        model,
        instance_images,
        prompts=prompts,
        overrides=(*given, *overrides),
        force=force,
        tracking_uri=tracking_uri,
        console=RunConsole(quiet=silent),
    )
    evaluation = result.evaluation
    own, *beside = by_bank(evaluation)
    rows = [("bank", f"{own[0].name}, hash {own[0].hash}")]
    rows += [("beside it", f"{encoder.name}, hash {encoder.hash}") for encoder, _ in beside]
    for name, shown in _SHOWN.items():
        if (figure := evaluation["figures"].get(name)) is not None:
            ends = f"{figure['low']:.3f} to {figure['high']:.3f}, n = {figure['n']}"
            rows.append((shown, f"{figure['mean']:.3f}  ({ends})"))
    rows += [("warning", warning) for warning in evaluation["warnings"]]
    if result.gate is not None:
        rows.append(("champion", f"{'yes' if result.gate.moved else 'not moved'}: {result.gate.reason}"))
    for what, value in [*rows, ("written to", result.uri)]:
        click.echo(f"{what:>15}  {value}")
