"""Find, check and hash a base model: `miniature`, a diffusers directory at any fsspec address, or a hub id.

A base is identified by the sha256 over its files, so class images and models record exactly their base.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dreambooth.errors import InputError
from dreambooth.models.base_settings import BaseSettings, read_json
from dreambooth.models.download import from_hub, from_store, is_hub_id, is_remote

_COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
_SUFFIXES = (".json", ".txt", ".safetensors")
_VARIANT = re.compile(r"\.(fp16|bf16|non_ema)\b|non_ema")
_WEIGHTS = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx")


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model on this machine's disk."""

    address: str
    revision: str | None
    directory: Path

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
    def embedding_width(self) -> int:
        """Width of the text encoder's token embeddings."""
        return int(self.settings["text_encoder.hidden_size"])

    @cached_property
    def parameter_counts(self) -> dict[str, int]:
        """Parameters by component, read from the headers of the safetensors files."""
        return {part: _count_parameters(self.directory, part) for part in _WEIGHTS}


def resolve_base_model(address: str, revision: str | None = None) -> BaseModel:
    """Find a base model and check that it is a whole pipeline of a supported family.

    Raises InputError if it is missing, unavailable, unsupported or incomplete.
    """
    from dreambooth.models.families import family_of

    directory = _find(address, revision)
    family_of(directory)
    _check_whole(directory)
    return BaseModel(address=address, revision=revision, directory=directory)


def _find(address: str, revision: str | None) -> Path:
    if address == "miniature":
        from dreambooth.miniature import PIPELINE_DIR

        return PIPELINE_DIR
    if is_remote(address):
        return from_store(address, what="base_model")
    path = Path(address.removeprefix("file://")).expanduser()
    if path.is_dir():
        return path.resolve()
    if not is_hub_id(address):
        raise InputError(
            f"base_model {address!r}: expected 'miniature', a folder, an address such as s3://bucket/model or a hub id "
            f"such as owner/name, but there is no such folder"
        )
    return from_hub(
        address,
        what="base_model",
        allow=["model_index.json", *(f"{part}/*{end}" for part in _COMPONENTS for end in _SUFFIXES)],
        ignore=["*.fp16.*", "*.bf16.*", "*non_ema*"],
        revision=revision,
    )


def _check_whole(directory: Path) -> None:
    """Find missing files of an incomplete copy now, not when workers load it."""
    BaseSettings(directory).check_trainable()
    vocabularies = [directory / "tokenizer" / name for name in ("tokenizer.json", "vocab.json")]
    if not any(read_json(path) for path in vocabularies if path.is_file()):
        raise InputError(f"there is neither {vocabularies[0]} nor {vocabularies[1].name}; is the copy complete?")
    for part in _WEIGHTS:
        _count_parameters(directory, part)


def weight_files(directory: Path, part: str) -> list[Path]:
    """Weight files that `from_pretrained` reads: one, or those of an index. Raises InputError if there are none."""
    whole = directory / part / f"{_WEIGHTS[part]}.safetensors"
    index = whole.with_name(f"{whole.name}.index.json")
    # Where a repository has both, diffusers takes the several files, transformers the one.
    if whole.is_file() and not (index.is_file() and part != "text_encoder"):
        return [whole]
    if not index.is_file():
        raise InputError(f"there is no {whole}; {_instead(whole.parent)}")
    names = read_json(index).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise InputError(f"{index} is damaged: expected a weight_map with files beside it; copy it again")
    return [whole.with_name(name) for name in names]


def _instead(folder: Path) -> str:
    """The cure for weights in an unsupported format."""
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_WEIGHTS)
    variants = [(name, found[1]) for name in others if (found := _VARIANT.search(name)) and found[1]]
    for name, variant in variants:
        if name.endswith(".safetensors"):
            return (
                f"there is {name}, a variant, which isn't read. Download the weights themselves, or write them with "
                f"StableDiffusionPipeline.from_pretrained(..., variant={variant!r}).save_pretrained(...)"
            )
    if others:
        return (
            f"is the copy complete? There is {', '.join(others)}, which isn't read, as it could run anything; where "
            f"you trust it, write safetensors: "
            f"StableDiffusionPipeline.from_pretrained(..., use_safetensors=False).save_pretrained(...)"
        )
    if folder.parents[1].name == "snapshots":
        return (
            f"of {folder.parents[2].name.removeprefix('models--').replace('--', '/')} only whole safetensors are "
            f"downloaded. If the repository has none but variants such as fp16, write them with "
            f"StableDiffusionPipeline.from_pretrained(..., variant='fp16').save_pretrained(...) and give that folder"
        )
    return (
        "is the copy complete? A pipeline in another format becomes one with "
        "StableDiffusionPipeline.from_pretrained(...).save_pretrained(...)"
    )


def pipeline_files(directory: Path) -> list[Path]:
    """Files of a pipeline: its index, and settings, vocabularies and weights of the components it needs.

    Repositories hold more: single-file checkpoints, half-precision variants, a safety checker, their history.
    """
    files = [path for part in _COMPONENTS for path in (directory / part).rglob("*") if path.suffix in _SUFFIXES]
    return sorted([directory / "model_index.json", *(path for path in files if not _VARIANT.search(path.name))])


def _hash_directory(directory: Path) -> str:
    total = hashlib.sha256()
    for path in pipeline_files(directory):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(directory).as_posix()} {digest}\n".encode())
    return total.hexdigest()[:16]


def _count_parameters(directory: Path, part: str) -> int:
    from safetensors import SafetensorError, safe_open

    count = 0
    for path in weight_files(directory, part):
        try:
            with safe_open(path, framework="pt") as tensors:
                count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except FileNotFoundError:
            raise InputError(f"there is no {path}; is the copy complete?") from None
        except SafetensorError as error:
            raise InputError(f"{path} is damaged: {error}; copy it again") from None
    return count
