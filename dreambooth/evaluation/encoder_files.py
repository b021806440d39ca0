"""Find encoders' folders. Without PyTorch: a driver looks for an encoder and leaves it to others to load it."""

import json
from pathlib import Path

from dreambooth.errors import InputError
from dreambooth.miniature import VIT_DIR
from dreambooth.models.download import from_hub, from_store, is_hub_id, is_remote


def find_image_encoder(address: str | Path) -> Path:
    """The folder of an image encoder, `miniature`'s or a fetched one.

    Raises InputError if it isn't available.
    """
    if address == "miniature":
        return VIT_DIR
    return find_encoder_directory(address, what="the image encoder", model_type="vit")


def find_encoder_directory(address: str | Path, *, what: str, model_type: str) -> Path:
    """The folder of a transformers model: a folder, an address that fsspec knows, or a hub id, fetched once.

    Raises InputError, starting with `what`, if it isn't available or is of another type.
    """
    address = str(address)
    directory = Path(address.removeprefix("file://")).expanduser()
    if is_remote(address):
        directory = from_store(address, what=what)
    elif not directory.is_dir():
        if not is_hub_id(address):
            raise InputError(
                f"{what} {address!r}: expected a folder, an address or a hub id, but there is no such folder"
            )
        directory = from_hub(address, what=what, allow=["*.json", "*.txt", "*.safetensors"])
        if not list(directory.glob("*.safetensors")):  # older repositories; loaded with weights_only
            directory = from_hub(address, what=what, allow=["*.json", "*.txt", "pytorch_model.bin"])
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{what} {address!r}: there is no config.json in {directory}")
    kind = json.loads(path.read_text()).get("model_type")
    if kind != model_type:
        raise InputError(f"{what} {address!r} is of the type {kind!r}; expected {model_type!r}")
    if not [file for name in ("*.safetensors", "pytorch_model.bin") for file in directory.glob(name)]:
        raise InputError(f"{what} {address!r}: there are no weights in {directory}; is the copy complete?")
    return directory
