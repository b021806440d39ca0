"""Which weight files of a component are read: whole or in shards, the plain ones or else a half-precision variant."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dreambooth.errors import InputError
from dreambooth.models.component import Component
from dreambooth.models.config_fields import read_json

_READ_BEFORE_REOPENING = 16 * 2**20
VARIANTS = ("fp16", "bf16")
_VARIANT = re.compile(r"\.(fp16|bf16|non_ema)\b|non_ema")
_ONES = {"F32": b"\x00\x00\x80\x3f", "F16": b"\x00\x3c", "BF16": b"\x80\x3f"}
"""The number 1 in a weight file, by dtype."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx")


def variant_of(directory: Path, component: Component) -> str | None:
    """The variant to load: None for the weights themselves, else the half-precision variant that is there alone."""
    if component.weights is None or _plain(directory, component):
        return None
    for variant in VARIANTS:
        if any(path.is_file() for path in _names(directory, component, f".{variant}")):
            return variant
    return None


def has_weights(directory: Path, component: Component) -> bool:
    """Whether a component's folder holds any weights, whole or not, in a format that is read or not."""
    return any(path.suffix in WEIGHTS for path in (directory / component.folder).glob("*"))


def weight_files(directory: Path, component: Component) -> list[Path]:
    """Weight files that `from_pretrained` reads: one, or those of an index. Raises InputError if there are none."""
    variant = variant_of(directory, component)
    whole, index = _names(directory, component, f".{variant}" if variant else "")
    # Where a repository has both, diffusers takes the several files, transformers the one.
    if whole.is_file() and not (index.is_file() and component.library == "diffusers"):
        return [whole]
    if not index.is_file():
        raise InputError(f"there is no {whole}; is the copy complete? {_instead(whole.parent)}")
    names = read_json(index).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise InputError(f"{index} is damaged: expected a weight_map with files beside it; copy it again")
    return [whole.with_name(name) for name in names]


def count_parameters(directory: Path, component: Component) -> int:
    """Numbers in a component's weight files, from their headers. Raises InputError for a missing or damaged one."""
    count = 0
    for path in weight_files(directory, component):
        with open_weights(path, "np") as tensors:  # shapes alone, and PyTorch takes seconds to import
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count


def open_weights(path: Path, framework: str = "pt") -> Any:
    """Open a safetensors file for PyTorch or NumPy ("np"). Raises InputError if it is missing, damaged or cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework=framework)
    except FileNotFoundError:
        raise InputError(f"there is no {path}; is the copy complete?") from None
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}; copy it again") from None


class WeightFile:
    """A safetensors file whose tensors are read one by one, without more of it in memory than some 16 MiB.

    It is opened anew after so many bytes: pages read of an opened file count as the process's memory.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self._opened = open_weights(path)

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._opened.keys())

    def get_slice(self, name: str) -> Any:
        """Shape and dtype of a tensor."""
        return self._opened.get_slice(name)

    def get_tensor(self, name: str) -> Any:
        """A tensor, perhaps a view of the file: what of it is kept, is kept in memory."""
        if self._read >= _READ_BEFORE_REOPENING:
            self._opened = None  # closed first
            self._opened, self._read = open_weights(self._path), 0
        tensor = self._opened.get_tensor(name)
        self._read += tensor.numel() * tensor.element_size()
        return tensor


def open_tensors(directory: Path, component: Component) -> dict[str, WeightFile]:
    """A component's weight files by the names of their tensors; nothing is read but the headers."""
    return tensors_of(weight_files(directory, component))


def tensors_of(paths: Iterable[Path]) -> dict[str, WeightFile]:
    """Weight files by the names of their tensors."""
    opened: dict[str, WeightFile] = {}
    for path in paths:
        stored = WeightFile(path)
        opened |= dict.fromkeys(stored.keys(), stored)
    return opened


def is_identity(directory: Path, component: Component, name: str) -> bool:
    """Whether a stored matrix is the identity; read without PyTorch, which takes seconds to import."""
    for path in weight_files(directory, component):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            tensor = json.loads(file.read(size)).get(name)
            if tensor is None:
                continue
            (begin, end), (rows, *columns) = tensor["data_offsets"], tensor["shape"]
            one = _ONES.get(tensor["dtype"])
            if one is None or columns != [rows]:
                return False
            file.seek(8 + size + begin)
            identity: bytes = (one + bytes(rows * len(one))) * (rows - 1) + one
            return file.read(end - begin) == identity
    return False


def is_read(directory: Path, component: Component, path: Path) -> bool:
    """Whether a file of a component belongs to what is loaded: not where it is of another variant."""
    found, variant = _VARIANT.search(path.name), variant_of(directory, component)
    if variant is None or not (path.suffix == ".safetensors" or ".index." in path.name):
        return not found
    return found is not None and found[1] == variant


def plain_name(name: str) -> str:
    """A file's name without the variant in it."""
    for variant in VARIANTS:
        name = name.replace(f".{variant}.", ".").replace(f".{variant}-", "-")
    return name


def _names(directory: Path, component: Component, variant: str) -> tuple[Path, Path]:
    """Path of one whole file, and of an index of several."""
    folder = directory / component.folder
    whole = folder / f"{component.weights}{variant}.safetensors"
    # `model.safetensors.index.fp16.json`: the variant stands before the last suffix.
    return whole, folder / f"{component.weights}.safetensors.index{variant}.json"


def _plain(directory: Path, component: Component) -> bool:
    return any(path.is_file() for path in _names(directory, component, ""))


def unread(files: Sequence[str]) -> str:
    """The cure for a model with files of these names alone."""
    return (
        f"There is {', '.join(files)}, which isn't read, as it could run anything; where you trust it, write "
        f"safetensors: DiffusionPipeline.from_pretrained(..., use_safetensors=False).save_pretrained(...)"
    )


def _instead(folder: Path) -> str:
    """The cure for weights in an unsupported format."""
    others = sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHTS) if folder.is_dir() else []
    if others:
        return unread(others)
    return "A pipeline in another format becomes one with DiffusionPipeline.from_pretrained(...).save_pretrained(...)"
