"""Write a model as diffusers' folder, the weights in another dtype if one is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.models.cascade import SUPER_RESOLUTION
from dreambooth.models.families import family_of
from pipelines.apps.export.progress import counted_bytes
from pipelines.driver.console import RunConsole

if TYPE_CHECKING:
    from dreambooth.models.tensor_stream import Planned

_PIECE = 8 << 20


@dataclass(frozen=True, kw_only=True)
class _Pipeline:
    """A pipeline's files that are copied as they are, by their names, and those that are written anew."""

    directory: Path
    folder: str  # of the stage in the model's
    copied: Sequence[Path]
    written: "dict[Path, list[Planned]]"

    @property
    def size(self) -> int:
        """Bytes of all files, headers aside."""
        written = sum(tensor.size for planned in self.written.values() for tensor in planned)
        return written + sum(path.stat().st_size for path in self.copied)


def write_folder(directory: Path, target: Path, *, dtype: Any, cascade: bool, console: RunConsole) -> None:
    """Copy a pipeline, both of a cascade, each component's weights in one file where `dtype` isn't None."""
    from dreambooth.models.tensor_stream import write_tensors

    stages = [_planned(directory / folder, folder, dtype) for folder in ("", SUPER_RESOLUTION)[: 1 + cascade]]
    with counted_bytes(console, "diffusers", sum(stage.size for stage in stages)) as counted:
        for stage in stages:
            for path in stage.copied:
                _copy(path, target / stage.folder / path.relative_to(stage.directory), counted.add)
            for name, planned in stage.written.items():
                path = target / stage.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_tensors(path, planned, {"format": "pt"}, on_progress=counted.part())


def _planned(directory: Path, folder: str, dtype: Any) -> _Pipeline:
    from dreambooth.models.base_model import pipeline_files
    from dreambooth.models.tensor_stream import planned_as
    from dreambooth.models.weight_files import open_tensors

    parts = [part for part in family_of(directory).parts(directory) if part.weights is not None]
    parts = parts if dtype is not None else []
    folders = {part.folder for part in parts}
    copied = [
        path
        for path in pipeline_files(directory)
        if path.relative_to(directory).parts[0] not in folders
        or not (path.suffix == ".safetensors" or path.name.endswith(".index.json"))
    ]
    written = {
        Path(part.folder, f"{part.weights}.safetensors"): planned_as(open_tensors(directory, part), dtype)
        for part in parts
    }
    return _Pipeline(directory=directory, folder=folder, copied=copied, written=written)


def _copy(path: Path, target: Path, on_bytes: Any) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with path.open("rb") as source, target.open("wb") as copy:
        while piece := source.read(_PIECE):
            copy.write(piece)
            on_bytes(len(piece))
