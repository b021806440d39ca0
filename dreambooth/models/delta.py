"""Store a fine-tuned model as its exact change against the base.

Fine-tuning moves a weight by a little, so the integers that represent the old and new values differ in few low bits;
differences of integers are exact where differences of floats are not. Per tensor: both values in the model's own dtype
as order-preserving integers, their difference, its bytes sorted by significance, compressed with zstd. A delta names
its base by hash and restores the model bit for bit.

    write_delta(base, Path("model"), Path("delta"))
    rebuild(Path("delta"), Path("copy"))            # finds the base again, and compares hashes
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreambooth.errors import InputError
from dreambooth.models.base_model import BaseModel, resolve_base_model
from dreambooth.models.cascade import SUPER_RESOLUTION
from dreambooth.models.tensor_stream import Planned, Progress, write_tensors
from dreambooth.models.weight_files import WeightFile, tensors_of, weight_files

DESCRIPTION = "delta.json"
_FORMAT, _CASCADE = 1, 2
"""Formats of deltas against one base, and against both stages of a cascade."""
_MANIFEST = "manifest.json"
"""Lies beside the files of a published model, and names them: no part of it."""
_INTEGERS: dict[int, tuple[torch.dtype, Any, Any]] = {
    2: (torch.int16, np.int16, np.uint16),
    4: (torch.int32, np.int32, np.uint32),
}

_SAVED = (torch.float32, torch.bfloat16, torch.float16)
"""The order in which safetensors writes tensors of several dtypes."""


def is_delta(directory: Path) -> bool:
    """Whether a directory holds a delta rather than a model."""
    return (directory / DESCRIPTION).is_file()


def write_delta(base: BaseModel, model: Path, target: Path, second: BaseModel | None = None) -> None:
    """Write the change of `model`, a diffusers directory, against its base: of weights whose names the base has.

    `second` is the base of its second stage.
    """
    target.mkdir(parents=True, exist_ok=True)
    files = {}
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        name = path.relative_to(model).as_posix()
        if name == _MANIFEST:
            continue
        stage, own_name = _stage_of(name, base, second)
        files[name] = {"sha256": _sha256(path), "kept": _kept(path, stage, own_name)}
        if files[name]["kept"] == "change":
            _write_change(_weights_of(stage, own_name), path, target / name)
        elif files[name]["kept"] == "whole":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    description = {"format": _FORMAT, **_named(base), "files": files}
    if second is not None:
        description |= {"format": _CASCADE, SUPER_RESOLUTION: _named(second)}
    (target / DESCRIPTION).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


def rebuild(
    delta: Path, target: Path, base: BaseModel | None = None, *, on_progress: Progress = lambda done, total: None
) -> Path:
    """Restore a model from its delta into `target`, which is returned. `base` None: find the base named by the delta.

    One tensor is in memory at a time; `on_progress` counts the bytes read of base and delta. Raises InputError if the
    base isn't the delta's own, or the delta is damaged.
    """
    description = json.loads((delta / DESCRIPTION).read_text())
    if description.get("format") not in (_FORMAT, _CASCADE):
        raise InputError(
            f"{delta} is a delta of format {description.get('format')!r}; this version reads {_FORMAT} and {_CASCADE}"
        )
    base, second = _found(description, base), None
    if (of_second := description.get(SUPER_RESOLUTION)) is not None:
        second = _found(of_second, None, scales_up=True)
    sources: list[tuple[str, dict[str, str], list[Path]]] = []
    for name, file in description["files"].items():
        _check_name(name)
        if name == _MANIFEST:  # in deltas of earlier versions, but not in the registered ones
            continue
        stage, own_name = _stage_of(name, base, second)
        if file["kept"] == "change":
            sources.append((name, file, _weights_of(stage, own_name)))
        else:
            sources.append((name, file, [stage.directory / own_name if file["kept"] == "base" else delta / name]))
    done, total = 0, sum(path.stat().st_size for _, _, paths in sources for path in paths)
    for name, file, paths in sources:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        size = sum(path.stat().st_size for path in paths)
        if file["kept"] == "change":
            _apply_change(paths, delta / name, target / name, on_progress=_part(on_progress, done, size, total))
        else:
            shutil.copyfile(paths[0], target / name)
        if (got := _sha256(target / name)) != file["sha256"]:
            raise InputError(f"{name} was rebuilt with sha256 {got}, expected {file['sha256']}; the delta is damaged")
        done += size
        on_progress(done, total)
    return target


def _part(on_progress: Progress, begin: int, size: int, total: int) -> Progress:
    """Progress of a part of some size that begins after so much of the total."""
    return lambda done, end: on_progress(begin + size * done // max(1, end), total)


def _named(base: BaseModel) -> dict[str, Any]:
    return {"base_model": base.address, "revision": base.revision, "base_hash": base.hash}


def _found(named: dict[str, Any], base: BaseModel | None, *, scales_up: bool = False) -> BaseModel:
    """The base that a delta names, or the given one if it is that."""
    base = base or resolve_base_model(named["base_model"], named["revision"], scales_up=scales_up)
    if base.hash != named["base_hash"]:
        raise InputError(
            f"the model is kept as its change against the base with hash {named['base_hash']}, but {base.address} has "
            f"hash {base.hash}: another base, or another revision of it, would give another model"
        )
    return base


def _stage_of(name: str, base: BaseModel, second: BaseModel | None) -> tuple[BaseModel, str]:
    """The base of a model's file, or of its second stage, and the file's name there."""
    folder, _, rest = name.partition("/")
    return (second, rest) if second is not None and folder == SUPER_RESOLUTION else (base, name)


def _kept(path: Path, base: BaseModel, name: str) -> str:
    """`base`: the base has the same file; `change`: weights of the base's names and shapes; `whole`: anything else."""
    same = base.directory / name
    if same.is_file() and _sha256(same) == _sha256(path):
        return "base"
    if not (originals := _weights_of(base, name)):
        return "whole"
    shapes: dict[str, list[int]] = {}
    for original in originals:
        with safe_open(original, framework="pt") as old:
            shapes |= {key: old.get_slice(key).get_shape() for key in old.keys()}  # noqa: SIM118
    with safe_open(path, framework="pt") as new:
        tensors = {key: new.get_slice(key) for key in new.keys()}  # noqa: SIM118
        alike = all(tensor.get_shape() == shapes.get(key) for key, tensor in tensors.items())
        exact = alike and all(tensor.get_dtype() in ("F32", "F16", "BF16") for tensor in tensors.values())
        # Written again from its tensors, the file has to be the same one.
        return "change" if exact and new.metadata() == {"format": "pt"} else "whole"


def _weights_of(base: BaseModel, name: str) -> list[Path]:
    """Weight files of the base's component that a model's weight file belongs to: in shards or of a variant, perhaps.

    A model has its trained components in one file each.
    """
    folder = name.partition("/")[0]
    parts = [part for part in base.family.parts(base.directory) if part.folder == folder and part.weights is not None]
    return weight_files(base.directory, parts[0]) if parts and name.endswith(".safetensors") else []


def _load(paths: Sequence[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= load_file(path)
    return tensors


def _write_change(originals: Sequence[Path], path: Path, target: Path) -> None:
    before, after = _load(originals), load_file(path)
    changes, dtypes = {}, {}
    for name, tensor in after.items():
        difference = _folded(_ordered(tensor) - _ordered(before[name].to(tensor.dtype)))  # wraps round, and back again
        planes = difference.view(np.uint8).reshape(-1, difference.itemsize).T  # (bytes, N): the high ones are zeros
        packed = _codec().compress(np.ascontiguousarray(planes).tobytes(), asbytes=True)
        changes[name] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(changes, target, {"dtypes": json.dumps(dtypes)})


def _apply_change(originals: Sequence[Path], change: Path, target: Path, *, on_progress: Progress) -> None:
    """Write a file tensor by tensor, to the byte as `save_file` does: larger dtypes first, then by name."""
    before = tensors_of(originals)
    changes = WeightFile(change)
    with safe_open(change, framework="pt") as opened:
        dtypes = {name: getattr(torch, dtype) for name, dtype in json.loads(opened.metadata()["dtypes"]).items()}

    def changed(name: str) -> Tensor:
        dtype, old = dtypes[name], before[name].get_tensor(name)
        start = _ordered(old.to(dtype))
        packed = changes.get_tensor(name).numpy().tobytes()
        planes = np.frombuffer(_codec().decompress(packed, start.nbytes, asbytes=True), np.uint8)
        difference = np.ascontiguousarray(planes.reshape(start.itemsize, -1).T).reshape(-1).view(start.dtype)
        return _from_ordered(start + _unfolded(difference), dtype).reshape(old.shape)

    planned = [
        Planned(
            name=name,
            dtype=dtypes[name],
            shape=tuple(before[name].get_slice(name).get_shape()),
            make=partial(changed, name),
        )
        for name in sorted(dtypes, key=lambda name: (_SAVED.index(dtypes[name]), name))
    ]
    write_tensors(target, planned, {"format": "pt"}, on_progress=on_progress)


def _codec() -> pa.Codec:
    return pa.Codec("zstd", compression_level=9)


def _ordered(tensor: Tensor) -> Any:
    """Floats as unsigned integers (N,), neighbours next to each other: negative ones are counted downwards."""
    integer, _, unsigned = _INTEGERS[tensor.element_size()]
    bits: Any = tensor.contiguous().reshape(-1).view(integer).numpy().view(unsigned)
    sign = unsigned(1 << (8 * tensor.element_size() - 1))
    return np.where(bits & sign, ~bits, bits | sign).astype(unsigned)


def _from_ordered(ordered: Any, dtype: torch.dtype) -> Tensor:
    _, signed, unsigned = _INTEGERS[ordered.itemsize]
    sign = unsigned(1 << (8 * ordered.itemsize - 1))
    bits: Any = np.where(ordered & sign, ordered & ~sign, ~ordered).astype(unsigned)
    return torch.from_numpy(bits.view(signed)).view(dtype)


def _folded(difference: Any) -> Any:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ..., so that small differences of either sign have zeros in their high bytes."""
    return (difference << 1) ^ np.where(difference >> (8 * difference.itemsize - 1), ~difference.dtype.type(0), 0)


def _unfolded(folded: Any) -> Any:
    return (folded >> 1) ^ np.where(folded & 1, ~folded.dtype.type(0), 0)


def _check_name(name: str) -> None:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"the delta names a file {name!r}; expected a plain relative path")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
