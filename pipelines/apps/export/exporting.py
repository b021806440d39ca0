"""Export a registered or published model: as one file, as a LoRA, or as diffusers' folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dreambooth.errors import InputError
from dreambooth.models.cascade import SUPER_RESOLUTION
from dreambooth.models.families import Family, family_named
from pipelines.apps.export.averages import Weights, choose_weights, opened_weights
from pipelines.apps.export.folder import write_folder
from pipelines.apps.export.progress import counted_bytes
from pipelines.apps.export.staging import INDEX, Written, check_target, place_files, place_folder, staged
from pipelines.apps.generate import find_published
from pipelines.driver.cards import find_card, without_average
from pipelines.driver.console import RunConsole
from pipelines.storage.files import is_local, join, read_json
from pipelines.storage.publications import Manifest

if TYPE_CHECKING:
    from pipelines.apps.export.rank import Curve

_SAID = ("subject", "identifier", "class_noun", "base_model", "base_hash")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The files, the one that a reader opens last; what is to be known about them; and how the rank was chosen."""

    files: tuple[Written, ...]
    notes: tuple[str, ...] = ()
    curve: "Curve | None" = None


def export_whole(
    model: str,
    to: str,
    *,
    form: Literal["single-file", "diffusers"],
    dtype: str = "auto",
    ema: bool | None = None,
    tracking_uri: str | None = None,
    console: RunConsole | None = None,
) -> Exported:
    """Write all weights of a model, as one file or as diffusers' folder with its card, in `dtype` (auto: as stored).

    `ema` True asks for the moving average, False for the last step's weights, None for what is published.
    `model` is `models:/NAME@ALIAS`, `models:/NAME/VERSION`, the address of a published model, or a diffusers directory.
    Raises InputError for invalid input before any work starts.
    """
    import torch

    console, wanted = console or RunConsole(), None if dtype == "auto" else getattr(torch, dtype)
    manifest = find_manifest(model, tracking_uri)
    weights = choose_weights(manifest, ema)
    family = family_at(manifest)
    if form == "single-file":
        family.single_file_names(Path(), family.denoiser.folder, ())  # raises if it has none
    to = check_target(to, file=form == "single-file", need_bytes=stored_bytes(manifest))
    with opened_weights(weights, console) as directory, staged(to) as folder:
        if form == "single-file":
            path = folder / to.rpartition("/")[2]
            write_one_file(directory, path, dtype=wanted, metadata=said(weights), console=console)
            return Exported(files=place_files([(path, to)], console=console), notes=_notes(family, directory))
        copy, cascade = folder / "model", SUPER_RESOLUTION in manifest.metadata
        write_folder(directory, copy, dtype=wanted, cascade=cascade, console=console)
        if (card := find_card(manifest)) is not None:
            (card if weights.unaveraged is None else without_average(card)).write(copy)
        return Exported(files=place_folder(copy, to, console=console))


def write_one_file(
    directory: Path, path: Path, *, dtype: Any, metadata: Mapping[str, str], console: RunConsole
) -> None:
    """Write a diffusers directory as one file, with a bar."""
    from dreambooth.models.single_file import plan_single_file
    from dreambooth.models.tensor_stream import write_tensors

    planned = plan_single_file(directory, dtype=dtype)
    with counted_bytes(console, "single-file", sum(tensor.size for tensor in planned)) as counted:
        write_tensors(path, planned, {"format": "pt", **metadata}, on_progress=counted.part())


def find_manifest(model: str, tracking_uri: str | None) -> Manifest:
    """The publication of a model. Raises InputError if there is none."""
    if not model.startswith("models:"):
        return find_published(model)
    from pipelines.apps.evaluate_model import find_measurable

    return find_measurable(model, tracking_uri).manifest


def family_at(manifest: Manifest) -> Family:
    """The family of a publication, by its index alone. Raises InputError for an unsupported one."""
    kind = read_json(join(manifest.uri, INDEX)).get("_class_name")
    family = family_named(str(kind))
    if family is None:
        raise InputError(f"{manifest.uri} holds a {kind}, which is not supported")
    return family


def stored_bytes(manifest: Manifest) -> int:
    """Bytes of a publication; of a local folder without a manifest, those of its files."""
    if manifest.files or not is_local(manifest.uri):
        return sum(record.size for record in manifest.files.values())
    return sum(path.stat().st_size for path in Path(manifest.uri).rglob("*") if path.is_file())


def said(weights: Weights) -> dict[str, str]:
    """What a file says of its model in its header."""
    metadata: Mapping[str, Any] = weights.manifest.metadata
    return {name: str(metadata[name]) for name in _SAID if metadata.get(name)} | weights.metadata


def _notes(family: Family, directory: Path) -> tuple[str, ...]:
    """What the file can't hold of a model."""
    from dreambooth.models.single_file import left_out

    return tuple(
        f"{name} has no place in the file, whose readers take the identity for it; it differs from that by {share:.2%} "
        f"of its norm"
        for name, share in left_out(family, directory)
    )
