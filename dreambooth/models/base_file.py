"""A base model that is one safetensors file, as other programs' checkpoints are, made a diffusers folder.

Such a file holds weights alone: configurations and vocabularies come from the model that it descends from. By its
header that is a published one, from the hub; another's folder, address or hub id stands behind a `#`, and needs no
weights:

    model.safetensors
    s3://bucket/model.safetensors#/models/base
    owner/name/model.safetensors#owner/name

It is converted once; the folder lies in the cache under the sha256 of the file and of the configurations.
"""

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from dreambooth.config.addresses import shown
from dreambooth.errors import InputError
from dreambooth.models.component import Component
from dreambooth.models.download import cache_directory, from_hub, from_store, is_remote
from dreambooth.models.families import Family, family_of
from dreambooth.models.families.origins import FILES, origin_of

_FILE = ".safetensors"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_FORMAT = 1
"""Part of the folder's name: another way to convert is another folder."""


def is_file_address(address: str) -> bool:
    """Whether an address names one file of weights rather than a folder or a hub id."""
    return PurePosixPath(address.partition("#")[0]).suffix.lower() in (_FILE, *_PICKLES)


def split_address(address: str) -> tuple[str, str]:
    """(file, configuration) of a file's address, the latter empty if it has none. Raises InputError for a pickle."""
    file, _, config = address.partition("#")
    if not file.lower().endswith(_FILE):
        raise InputError(
            f"base_model {shown(file)!r} is a pickle, which can run anything when it is read; expected a file that "
            f"ends in {_FILE}. Where you trust it, write it as one: safetensors.torch.save_file("
            f"torch.load(..., weights_only=True)['state_dict'], ...)"
        )
    return file, config


def absolute_file(address: str) -> str:
    """The address with absolute paths for what is local."""

    def absolute(part: str) -> str:
        path = Path(part.removeprefix("file://")).expanduser()
        return str(path.absolute()) if not is_remote(part) and path.exists() else part

    file, config = split_address(address)
    return f"{absolute(file)}#{absolute(config)}" if config else absolute(file)


def find_file(file: str, revision: str | None) -> Path:
    """The file on this machine's disk, fetched if it is remote. Raises InputError if it isn't to be had."""
    if is_remote(file):
        return from_store(file, what="base_model")
    path = Path(file.removeprefix("file://")).expanduser()
    if path.is_file():
        return path.resolve()
    parts = PurePosixPath(file).parts
    if len(parts) < 3 or file.startswith((".", "/", "~")):
        raise InputError(
            f"base_model {file!r}: there is no such file; expected one here, an address such as "
            f"s3://bucket/model{_FILE}, or a hub id with a file, such as owner/name/model{_FILE}"
        )
    name = "/".join(parts[2:])
    folder = from_hub("/".join(parts[:2]), what="base_model", allow=[name], revision=revision)
    if not (folder / name).is_file():
        raise InputError(f"base_model {file!r}: the hub's {'/'.join(parts[:2])} has no file {name}")
    return folder / name


def config_of(file: Path, address: str) -> str:
    """The hub id of the configurations of a file at an address, by its header.

    Raises InputError for a damaged file, and where the header doesn't tell.
    """
    stored = _opened(file)
    shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118 - it is no mapping
    origin = origin_of(shapes, stored.metadata() or {})
    if len(origin.choices) == 1:
        return next(iter(origin.choices))
    if origin.choices:
        each = ", or ".join(f"--base-model '{shown(address)}#{name}' ({how})" for name, how in origin.choices.items())
        raise InputError(
            f"base_model {shown(address)!r} is {origin.name}, and its header doesn't say which: give {each}"
        )
    raise InputError(
        f"base_model {shown(address)!r} is {origin.name}; expected a whole checkpoint of {FILES}. "
        f"If it descends from another model of their architecture, {behind_it(address)}"
    )


def behind_it(address: str) -> str:
    """How to name the model that a file descends from."""
    return (
        f"give that one's folder, address or hub id, without weights if you like, behind a '#', as in --base-model "
        f"'{shown(address)}#owner/name'"
    )


def converted(file: Path, config: Path) -> Path:
    """The diffusers folder of a file, with configurations and vocabularies of the folder `config`; made once.

    Raises InputError for a damaged file, and for one that isn't of the configured architecture.
    """
    family = family_of(config)
    settings = sorted(_settings(family, config))
    total = hashlib.sha256(f"{_FORMAT} {_sha256(file)}\n".encode())
    for path in settings:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(config).as_posix()} {digest}\n".encode())
    stamp = total.hexdigest()[:32]
    target = cache_directory() / "bases" / stamp
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{stamp}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # all workers of a machine ask at once
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{stamp}-") as partial:
                whole = Path(partial) / "base"
                for path in settings:
                    (whole / path.relative_to(config)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, whole / path.relative_to(config))
                _convert(family, file, config, whole)
                whole.rename(target)
    return target


def _settings(family: Family, config: Path) -> Iterator[Path]:
    """The index, configurations and vocabularies of a pipeline, without weights."""
    yield config / "model_index.json"
    for part in family.parts(config):
        for path in (config / part.folder).iterdir():
            if path.suffix in (".json", ".txt", ".model") and not path.name.endswith(".index.json"):
                yield path


def _convert(family: Family, file: Path, config: Path, target: Path) -> None:
    from dreambooth.models.tensor_stream import write_tensors

    stored = _opened(file)
    there = dict.fromkeys(stored.keys())
    for part in family.parts(config):
        if part.weights is not None:
            try:
                planned = list(_planned(family, file, stored, there, config, part))
                write_tensors(target / part.folder / f"{part.weights}{_FILE}", planned, {"format": "pt"})
            except InputError:
                raise
            except ValueError as error:
                raise InputError(f"{file} isn't the model that {config} configures: {error}") from None


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged: {error}; copy it again") from None


def _planned(
    family: Family, file: Path, stored: Any, there: Mapping[str, None], config: Path, part: Component
) -> Iterator[Any]:
    """A component's tensors by diffusers' names, read out of the file when they are written."""
    from dreambooth.models.tensor_stream import Planned, dtype_named

    shapes = _shapes(family, config, part)
    names = family.single_file_names(config, part.folder, shapes)
    if without := sorted(shapes.keys() - names.keys()):
        raise InputError(
            f"{file} can't be a base model: files of {family.name} don't hold {part.folder}.{without[0]}; give the "
            f"model as diffusers' folder"
        )
    starts: dict[str, int] = {}
    for name in sorted(names, key=lambda name: (names[name].name, names[name].place)):
        placed = names[name]
        source = next((one for one in (placed.name, placed.name.replace("text_model.", "")) if one in there), None)
        if source is None:
            raise InputError(
                f"{file} lacks {placed.name}, which {family.name} as configured in {config} has; is it a whole "
                f"checkpoint, with text encoders and VAE, of that architecture?"
            )
        piece = stored.get_slice(source)
        start = starts.get(source, 0)
        yield Planned(
            name=name,
            dtype=dtype_named(piece.get_dtype()),
            shape=shapes[name],
            make=partial(_read, piece, placed.form, start, shapes[name]),
        )
        starts[source] = start + shapes[name][placed.form == "transposed"]
    for source, rows in starts.items():
        if (found := stored.get_slice(source).get_shape()[0]) != rows:
            raise InputError(
                f"{source} in {file} has {found} rows, and {rows} by the configuration in {config}: it is of another "
                f"model; name the one that the file descends from"
            )


def _read(piece: Any, form: Any, start: int, shape: tuple[int, ...]) -> Any:
    """A tensor of the given shape, which begins at row `start` of a tensor of the file."""
    from dreambooth.models.placed import unformed

    rows = shape[1] if form == "transposed" else shape[0]
    return unformed(piece[start : start + rows], form)


def _shapes(family: Family, config: Path, part: Component) -> dict[str, tuple[int, ...]]:
    """Shapes of a component's tensors by name, each tensor once."""
    module = family.empty(config, part.folder)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    return {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if name in own and not name.endswith("position_ids")
    }


def _sha256(file: Path) -> str:
    """sha256 of a file, remembered in the cache while its size and time stay."""
    state = file.stat()
    key = hashlib.sha256(f"{file} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:32]
    known = cache_directory() / "hashes" / key
    if known.is_file() and len(digest := known.read_text().strip()) == hashlib.sha256().digest_size * 2:
        return digest
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    known.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=known.parent, delete=False) as partial:
        partial.write(digest)
    Path(partial.name).replace(known)
    return digest
