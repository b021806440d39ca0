"""Which base model: `miniature`, a diffusers directory wherever fsspec reaches, or a hub id; found, checked and hashed.

A base is named by the sha256 over its files, so class images and models say exactly what they were made from.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import fsspec

from dreambooth.errors import InputError

_WEIGHTS_OF_OTHERS = ("safety_checker", "feature_extractor", "image_encoder")


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
    def resolution(self) -> int:
        """Side in pixels of the images it was trained on."""
        unet = json.loads((self.directory / "unet" / "config.json").read_text())
        vae = json.loads((self.directory / "vae" / "config.json").read_text())
        downsamplings = len(vae["block_out_channels"]) - 1
        return int(unet["sample_size"]) << downsamplings

    @cached_property
    def parameter_counts(self) -> dict[str, int]:
        """Parameters by component, read from the headers of the safetensors files."""
        return {part: _count_parameters(self.directory / part) for part in ("unet", "text_encoder", "vae")}


def resolve_base_model(address: str, revision: str | None = None) -> BaseModel:
    """Find a base model and check that it is a pipeline of a supported family.

    Raises InputError when it isn't there, can't be had, or isn't supported.
    """
    from dreambooth.families import family_of

    directory = _find(address, revision)
    family_of(directory)
    return BaseModel(address=address, revision=revision, directory=directory)


def _find(address: str, revision: str | None) -> Path:
    if address == "miniature":
        from dreambooth.miniature import PIPELINE_DIR

        return PIPELINE_DIR
    if "://" in address:
        return _download(address)
    path = Path(address).expanduser()
    if path.is_dir():
        return path.resolve()
    if address.startswith((".", "/", "~")) or address.count("/") != 1:
        raise InputError(
            f"base_model {address!r}: expected 'miniature', a folder, an address such as s3://bucket/model or a hub id "
            f"such as owner/name, but there is no such folder"
        )
    return _from_hub(address, revision)


def _from_hub(address: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                address,
                revision=revision,
                allow_patterns=["*.json", "*.txt", "*.safetensors"],
                ignore_patterns=[f"{part}/*" for part in _WEIGHTS_OF_OTHERS] + ["*.fp16.*", "*non_ema*"],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"base_model {address!r}{f' at {revision!r}' if revision else ''} is neither a folder "
            f"here nor to be had from the hub ({type(error).__name__}: {reason}); check the name and the network, or "
            f"download it and give its folder"
        ) from None


def cache_directory() -> Path:
    """Where downloaded bases are kept: $DREAMBOOTH_CACHE, else ~/.cache/dreambooth."""
    return Path(os.environ.get("DREAMBOOTH_CACHE", "~/.cache/dreambooth")).expanduser()


def _download(address: str) -> Path:
    """Copy a remote directory to the cache, once; a copy that broke off is never mistaken for a whole one."""
    try:
        filesystem, path = fsspec.url_to_fs(address)
        listing = {name: info for name, info in filesystem.find(path, detail=True).items() if info["type"] == "file"}
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"base_model {address!r} can't be read: {type(error).__name__}: {error}") from None
    if not listing:
        raise InputError(f"base_model {address!r}: there is nothing at that address")
    stamp = hashlib.sha256(
        repr([address, sorted((name, info["size"], str(info.get("ETag"))) for name, info in listing.items())]).encode()
    ).hexdigest()[:16]
    target = cache_directory() / "bases" / stamp
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{stamp}-"))
        try:
            for name in listing:
                local = partial / Path(name).relative_to(path.rstrip("/"))
                local.parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(name, str(local))
            partial.rename(target)
        except FileExistsError:  # another process was faster
            shutil.rmtree(partial)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            if not target.is_dir():
                raise
    return target


def _pipeline_files(directory: Path) -> list[Path]:
    files = [
        path for path in directory.rglob("*") if path.is_file() and path.suffix in (".json", ".txt", ".safetensors")
    ]
    return sorted(path for path in files if path.relative_to(directory).parts[0] not in _WEIGHTS_OF_OTHERS)


def _hash_directory(directory: Path) -> str:
    total = hashlib.sha256()
    for path in _pipeline_files(directory):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(directory).as_posix()} {digest}\n".encode())
    return total.hexdigest()[:16]


def _count_parameters(directory: Path) -> int:
    from safetensors import safe_open

    count = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                size = 1
                for side in tensors.get_slice(name).get_shape():
                    size *= side
                count += size
    return count
