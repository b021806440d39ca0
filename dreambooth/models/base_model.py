"""Find, check and hash a base model: built in, a diffusers directory at any fsspec address, a hub id, or one file.

A base is identified by the sha256 over its files, so class images and models record exactly their base.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dreambooth.config.addresses import shown
from dreambooth.errors import InputError
from dreambooth.miniature import BASES, SECOND_STAGES, WEIGHTS_DIR
from dreambooth.models.base_file import (
    behind_it,
    config_of,
    converted,
    find_file,
    is_file_address,
    split_address,
)
from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.config_fields import read_json
from dreambooth.models.download import from_hub, from_store, hub_files, is_hub_id, is_remote
from dreambooth.models.families import FAMILIES, Component, Family, family_of
from dreambooth.models.families.tokenizers import VOCABULARIES
from dreambooth.models.licence import CARD
from dreambooth.models.text_readers import TextReader, text_readers
from dreambooth.models.weight_files import VARIANTS, WEIGHTS, count_parameters, has_weights, is_read, unread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dreambooth.config.train import TrainConfig

_SUFFIXES = (".json", ".txt", ".model", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model on this machine's disk."""

    address: str
    revision: str | None
    directory: Path

    def __getstate__(self) -> dict[str, Any]:
        """Without tokenizers, which are quicker to load than to send."""
        return {name: value for name, value in self.__dict__.items() if name not in ("tokenizer", "text_readers")}

    @cached_property
    def hash(self) -> str:
        """First 16 hex digits of the sha256 over names and contents of the pipeline's files."""
        return _hash_directory(self.directory)

    @cached_property
    def settings(self) -> BaseSettings:
        """Settings of its configuration files."""
        return BaseSettings(self.directory)

    @property
    def resolution(self) -> int:
        """Side in pixels of its training images. Raises InputError if its configuration has none."""
        return self.settings.resolution

    @property
    def family(self) -> Family:
        """Its family."""
        return self.settings.family

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of its first text encoder. Raises InputError for invalid files."""
        return self.family.tokenizer(self.directory)

    @cached_property
    def text_readers(self) -> tuple[TextReader, ...]:
        """Readers of its text encoders, in order. Raises InputError for invalid files."""
        return text_readers(self.directory)

    @cached_property
    def text_encoders(self) -> tuple[str, ...]:
        """Folders of its text encoders, in order."""
        return tuple(part.folder for part in self.family.text_encoders(self.directory))

    def run_text_encoders(self, train: "TrainConfig") -> tuple[str, ...]:
        """Folders of the text encoders that every training step runs, see `Family.chosen_text_encoders`."""
        return self.family.chosen_text_encoders(self.text_encoders, train)

    @property
    def pipeline_class(self) -> str:
        """The class of its diffusers pipeline, supported or not."""
        return str(read_json(self.directory / "model_index.json").get("_class_name"))

    def embedding_width(self, folder: str) -> int:
        """Width of a text encoder's token embeddings."""
        config = read_json(self.directory / folder / "config.json")
        return int(config.get(self.family.component(folder).width) or 512)

    @cached_property
    def parameter_counts(self) -> dict[str, int]:
        """Parameters by component folder, read from the headers of the safetensors files.

        Where those are missing, counted on the meta device.
        """
        return {
            part.folder: count_parameters(self.directory, part)
            if has_weights(self.directory, part)
            else self.family.count_parameters(self.directory, part.folder)
            for part in _with_weights(self.directory)
        }

    @property
    def has_weights(self) -> bool:
        """Whether all weights are there; if not, it can be planned with, and nothing else."""
        return all(has_weights(self.directory, part) for part in _with_weights(self.directory))


def resolve_base_model(
    address: str, revision: str | None = None, *, scales_up: bool = False, weights: bool = True
) -> BaseModel:
    """Find a base model, or with `scales_up` the second stage of one, and check that it is whole and supported.

    Without `weights` its weight files may be missing, and aren't downloaded from the hub. Raises InputError if it is
    missing, unavailable, unsupported or incomplete.
    """
    try:
        directory = _find(address, revision, weights=weights, built_in=SECOND_STAGES if scales_up else BASES)
        _check_whole(directory, weights=weights)
    except InputError as error:
        if not scales_up:
            raise
        said = str(error)
        raise InputError(f"super_resolution.{said}" if said.startswith("base_model ") else said) from None
    _check_stage(address, family_of(directory), scales_up=scales_up)
    return BaseModel(address=address, revision=revision, directory=directory)


def _check_stage(address: str, family: Family, *, scales_up: bool) -> None:
    if family.scales_up and not scales_up:
        raise InputError(
            f"base_model {address!r} is {family.name}, which scales up the pictures of another model; give stage I as "
            f"base_model, and this as super_resolution.base_model"
        )
    if scales_up and not family.scales_up:
        raise InputError(
            f"super_resolution.base_model {address!r} is {family.name}; expected a model that scales up pictures: "
            f"{', '.join(one.name for one in FAMILIES if one.scales_up)}"
        )


def _find(address: str, revision: str | None, *, weights: bool | None, built_in: Mapping[str, str] = BASES) -> Path:
    """The directory; from the hub without its `weights`, which may be of any format if it is None.

    Names in `built_in` stand for folders that come with the package.
    """
    if (folder := built_in.get(address, BASES.get(address))) is not None:
        return _built_in(address, folder)
    if is_file_address(address):
        return _find_file(address, revision)
    if is_remote(address):
        return from_store(address, what="base_model")
    path = Path(address.removeprefix("file://")).expanduser()
    if path.is_dir():
        return path.resolve()
    if not is_hub_id(address):
        raise InputError(
            f"base_model {address!r}: expected {', '.join(map(repr, built_in))}, a folder, an address such as "
            f"s3://bucket/model, a hub id such as owner/name, or one .safetensors file, but there is no such folder"
        )
    return _from_hub(address, revision, weights=weights)


def _find_file(address: str, revision: str | None) -> Path:
    """One file, converted by the configurations of the model behind its `#`, else of the one its header tells."""
    file, named = split_address(address)
    path = find_file(file, revision)
    config = named or config_of(path, file)
    try:
        settings = _find(config, None, weights=None)
    except InputError as error:
        if named:
            raise
        raise InputError(
            f"base_model {shown(file)!r} takes the configurations of {config}, but {error}; or {behind_it(file)}"
        ) from None
    return converted(path, settings)


def _built_in(name: str, folder: str) -> Path:
    """A built-in model as it is installed, or below $DREAMBOOTH_WEIGHTS where a package comes without its weights."""
    if (directory := WEIGHTS_DIR / folder).is_dir():
        return directory
    weights = os.environ.get("DREAMBOOTH_WEIGHTS", "").rstrip("/")
    if is_remote(weights):
        return from_store(f"{weights}/{folder}", what="base_model")
    if weights and (directory := Path(weights) / folder).is_dir():
        return directory
    raise InputError(
        f"base_model {name!r}: its weights aren't in {directory}; give $DREAMBOOTH_WEIGHTS the address of a copy of "
        f"dreambooth/miniature/weights"
    )


def _from_hub(address: str, revision: str | None, *, weights: bool | None) -> Path:
    """Download the card and what the family needs: no single-file checkpoints, other formats, variants of weights."""
    directory = from_hub(address, what="base_model", allow=["model_index.json", CARD], revision=revision)
    components = family_of(directory, whole=False).components
    if weights is not None:
        _check_formats(address, revision, [part for part in components if not _safetensors(directory, part)])
    from_hub(
        address,
        what="base_model",
        allow=[f"{part.folder}/*{end}" for part in components for end in _SUFFIXES],
        ignore=[*(f"*.{variant}*" for variant in VARIANTS), "*non_ema*", *([] if weights else ["*.safetensors"])],
        revision=revision,
    )
    if not weights:
        return directory
    for part in components:
        for variant in VARIANTS:
            if part.weights is None or not (directory / part.folder).is_dir() or _safetensors(directory, part):
                break
            files = [f"{part.folder}/{part.weights}*.{variant}*"]
            from_hub(address, what="base_model", allow=files, ignore=["*.bin*", "*.msgpack"], revision=revision)
    return directory


def _check_formats(address: str, revision: str | None, parts: Sequence[Component]) -> None:
    """Refuse weights that lie on the hub as pickles alone, before anything large is downloaded."""
    wanted = [part for part in parts if part.weights is not None]
    files = [PurePosixPath(name) for name in (hub_files(address, revision) if wanted else ())]
    for part in wanted:
        own = [path for path in files if str(path.parent) == part.folder and path.suffix in WEIGHTS]
        if own and not any(path.suffix == ".safetensors" for path in own):
            raise InputError(
                f"base_model {address!r}: the hub has no {part.folder}/{part.weights}.safetensors. "
                f"{unread(sorted(map(str, own)))}"
            )


def _safetensors(directory: Path, part: Component) -> bool:
    return any((directory / part.folder).glob("*.safetensors"))


def _with_weights(directory: Path) -> list[Component]:
    """Components with weights that a directory has."""
    return [part for part in family_of(directory).parts(directory) if part.weights is not None]


def _check_whole(directory: Path, *, weights: bool) -> None:
    """Find missing files of an incomplete copy now, not when workers load it."""
    settings = BaseSettings(directory)
    settings.check_trainable()
    _check_unquantized(directory)
    for part in settings.family.parts(directory):
        if part.role != "tokenizer":
            continue
        names = [directory / part.folder / name for name in VOCABULARIES]
        known = [path for path in names if path.is_file() and (path.suffix == ".model" or read_json(path))]
        if not known:
            raise InputError(
                f"there is neither {names[0]} nor {names[1].name} or {names[2].name}; is the copy complete?"
            )
    parts = _with_weights(directory)
    if weights or any(has_weights(directory, part) for part in parts):  # a copy that broke off has some of them
        for part in sorted(parts, key=lambda part: not has_weights(directory, part)):
            count_parameters(directory, part)


def _check_unquantized(directory: Path) -> None:
    for part in _with_weights(directory):
        path = directory / part.folder / "config.json"
        if (quantized := read_json(path).get("quantization_config")) is not None:
            method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
            raise InputError(
                f"{path}: the weights are quantized (quantization_config, {method}), which no layer can be fine-tuned "
                f"from; give the model that they were quantized from"
            )


def pipeline_files(directory: Path) -> list[Path]:
    """Files of a pipeline: its index, and settings, vocabularies and weights of the components it needs.

    Repositories hold more: single-file checkpoints, half-precision variants, a safety checker, their history.
    """
    files = [
        path
        for part in family_of(directory).parts(directory)
        for path in (directory / part.folder).rglob("*")
        if path.suffix in _SUFFIXES and is_read(directory, part, path)
    ]
    return sorted([directory / "model_index.json", *files])


def _hash_directory(directory: Path) -> str:
    total = hashlib.sha256()
    for path in pipeline_files(directory):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(directory).as_posix()} {digest}\n".encode())
    return total.hexdigest()[:16]
