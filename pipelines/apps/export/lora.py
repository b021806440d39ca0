"""Export the difference to the base model as a LoRA, of a given rank or the smallest that keeps the figures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.errors import InputError
from dreambooth.models.cascade import SUPER_RESOLUTION
from pipelines.apps.evaluate_model import MeasurableModel, find_measurable, settings_of
from pipelines.apps.export.averages import choose_weights, opened_weights
from pipelines.apps.export.exporting import Exported, family_at, said, stored_bytes
from pipelines.apps.export.progress import counted_bytes
from pipelines.apps.export.rank import MOST_RANK, Curve, choose_rank, draw
from pipelines.apps.export.staging import beside, check_target, place_files, staged
from pipelines.driver.console import RunConsole

if TYPE_CHECKING:
    import torch

    from dreambooth.data.images import InstanceImage
    from dreambooth.models.base_model import BaseModel
    from dreambooth.models.lora_file import LoraNames
    from dreambooth.models.low_rank import LowRank
    from dreambooth.training.best_checkpoint import Score

EMBEDDING, CURVE, PLOT = ".embedding.safetensors", ".curve.json", ".curve.png"


def export_lora(
    model: str,
    to: str,
    *,
    rank: int | None = None,
    within: float = 0.02,
    names: "LoraNames" = "diffusers",
    dtype: str = "auto",
    ema: bool | None = None,
    instance_images: str | None = None,
    overrides: Sequence[str] = (),
    tracking_uri: str | None = None,
    console: RunConsole | None = None,
) -> Exported:
    """Write a LoRA, and beside it the identifier's embeddings if they changed.

    `rank` None is the smallest whose DINO and CLIP-T on `evaluation.prompts`, against `instance_images`, are no more
    than `within` below the model's; the curve and a plot of it lie beside the file. `dtype` auto is float32, and
    `ema` as `export_whole` takes it. Raises InputError for invalid input before any work starts.
    """
    import torch

    from dreambooth.models.lora_file import check_lora, write_embedding, write_lora
    from dreambooth.models.low_rank import low_rank

    console = console or RunConsole()
    found = find_measurable(model, tracking_uri)
    weights = choose_weights(found.manifest, ema)
    check_lora(family_at(found.manifest), names)
    if SUPER_RESOLUTION in found.manifest.metadata:
        raise InputError(
            "the model is a cascade of two stages, and a LoRA holds the change of one; export with --format diffusers"
        )
    if rank is None and instance_images is None:
        raise InputError(
            "--rank auto measures samples against the subject's images; give them with --instance-images, or a number "
            "with --rank"
        )
    config, base = _base_of(found, instance_images, overrides)
    images = () if rank is not None else _images(config, base, console)
    to = check_target(to, file=True, need_bytes=stored_bytes(found.manifest))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    with opened_weights(weights, console) as directory, staged(to) as folder:
        with console.bar("decomposed") as bar:
            low = low_rank(
                base.directory,
                directory,
                rank=rank or MOST_RANK,
                identifier=config.subject.identifier,
                device=device,
                on_progress=lambda done, total: bar(done, total, "tensors"),
            )
        if not low.layers:
            alone = "in the identifier's embeddings alone" if low.embeddings else "in no layer"
            raise InputError(f"the model differs from its base {alone}, and a LoRA holds layers; nothing was written")
        curve = None
        if rank is None:
            score = _scorer(found, config, base, images, low, directory, device, wanted)
            curve = choose_rank(
                low,
                within=within,
                bank=_bank_name(config),
                score=score,
                size_of=lambda rank: lora_bytes(low, rank, wanted.itemsize) if rank else stored_bytes(found.manifest),
                say=console.line,
            )
            rank = curve.rank
        files: list[tuple[Path, str]] = []

        def add(ending: str) -> Path:
            files.append((folder / f"file{ending}", beside(to, ending)))
            return files[-1][0]

        if low.embeddings:
            write_embedding(base.family, low, add(EMBEDDING))
        if curve is not None:
            add(CURVE).write_text(curve.as_json())
            draw(curve, add(PLOT))
        path = folder / "lora.safetensors"
        metadata = said(weights) | {"rank": str(rank)}
        with counted_bytes(console, "lora", lora_bytes(low, rank, wanted.itemsize)) as counted:
            write_lora(
                base.directory,
                low,
                path,
                rank=rank,
                names=names,
                dtype=wanted,
                metadata=metadata,
                on_progress=counted.part(),
            )
        placed = place_files([*files, (path, to)], console=console)
        return Exported(files=placed, notes=_notes(low, rank, curve), curve=curve)


def lora_bytes(low: "LowRank", rank: int, itemsize: int) -> int:
    """Bytes of the numbers of a LoRA's file: every layer has the rank."""
    return sum(rank * (len(layer.up) + layer.down[0].numel()) for layer in low.layers) * itemsize


def _base_of(
    found: MeasurableModel, instance_images: str | None, overrides: Sequence[str]
) -> "tuple[DreamBoothConfig, BaseModel]":
    """The model's configuration, and its base on this machine. Raises InputError if that is another one now."""
    from dreambooth.data.buckets import with_base
    from dreambooth.models.base_model import resolve_base_model

    # Without measuring, no image is looked at.
    config = load_config(settings_of(found, instance_images or "."), tuple(overrides))
    base, hash_then = resolve_base_model(config.base_model, config.revision), found.manifest.metadata["base_hash"]
    if base.hash != hash_then:
        raise InputError(
            f"the model was made from a base model of hash {hash_then}, and {config.base_model} has {base.hash} here; "
            f"name the one it was made from with --set base_model=..."
        )
    return config.model_copy(update={"images": with_base(config.images, base.settings)}), base


def _images(config: DreamBoothConfig, base: "BaseModel", console: RunConsole) -> "tuple[InstanceImage, ...]":
    """The subject's images, checked, and the bank of encoders with them."""
    from dreambooth.data.buckets import sizes_of
    from dreambooth.data.inspection import inspect_addresses
    from pipelines.stages.evaluate_stage import compared_images

    _bank_name(config)
    inspection = inspect_addresses(
        config.subject.instance_images,
        resolution=int(config.images.resolution or 0),
        max_pixels=config.images.max_pixels,
        masked=config.images.masked,
        buckets=sizes_of(config.images, base.settings),
    )
    compared = compared_images(config, inspection)
    for warning in (*inspection.warnings, *compared.warnings):
        console.warn(warning)
    return compared.images


def _bank_name(config: DreamBoothConfig) -> str:
    from pipelines.stages.evaluation_task import bank_address

    return bank_address(config.evaluation, config.base_model).name


def _scorer(
    found: MeasurableModel,
    config: DreamBoothConfig,
    base: "BaseModel",
    images: "Sequence[InstanceImage]",
    low: "LowRank",
    directory: Path,
    device: str,
    dtype: "torch.dtype",
) -> "Callable[[int | None, bool], Score]":
    """Measure a rank as it is exported in `dtype`, with the identifier's embeddings or without; None: the model."""
    from dreambooth.models.low_rank import weights_of, weights_with
    from dreambooth.sampling.best_dtype import best_dtype
    from pipelines.worker.fidelity import FidelityScorer

    scorer = FidelityScorer(
        config,
        images,
        key=f"{found.manifest.metadata['key']}-lora",
        base_hash=base.hash,
        dtype=best_dtype(device),
        device=device,
    )

    def score(rank: int | None, embedding: bool) -> "Score":
        if rank is None:
            return scorer.score(0, weights_of(directory))
        return scorer.score(rank, weights_with(base.directory, low, rank, embeddings=embedding, dtype=dtype))

    return score


def _notes(low: "LowRank", rank: int, curve: Curve | None) -> tuple[str, ...]:
    """What the LoRA holds of the change, and what not."""
    total = sum(low.squares.values())
    from dreambooth.models.low_rank import HELD

    others = ", ".join(
        f"{kind} {square / total:.2%}" for kind, square in sorted(low.squares.items()) if kind not in HELD
    )
    held = low.held(rank)
    notes = [f"rank {rank} holds {held:.1%} of the squared change; what no LoRA holds: {others or 'nothing'}"]
    if not low.embeddings:
        return tuple(notes)
    if curve is None:
        notes.append(
            "the identifier's embeddings changed too, and lie beside the LoRA; whether it binds without them, --rank "
            "auto measures"
        )
    elif curve.embedding:
        notes.append("the figures are those with the identifier's embeddings, which lie beside the LoRA: load both")
    else:
        notes.append("the figures are those of the LoRA alone; the identifier's embeddings lie beside it")
    return tuple(notes)
