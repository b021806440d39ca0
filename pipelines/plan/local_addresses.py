"""Local addresses in a configuration: made absolute for workers in other folders, and named where nodes can't share
them."""

from pathlib import Path
from typing import Any

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.miniature import BASES
from dreambooth.models.base_file import absolute_file, is_file_address
from pipelines.storage.files import absolute, is_local


def local_addresses(config: DreamBoothConfig) -> list[str]:
    """Local addresses; several nodes can't read them without a shared disk."""
    addresses = [config.run_uri, config.prior_uri, *config.subject.instance_images]
    bases = [name for name in (config.base_model, config.super_resolution.base_model) if name is not None]
    addresses += [part for name in bases if name not in BASES for part in name.split("#") if Path(part).exists()]
    return [address for address in addresses if is_local(address)]


def with_absolute_addresses(config: DreamBoothConfig) -> DreamBoothConfig:
    """Make local addresses absolute: Ray's workers run in other folders."""
    storage = config.storage.model_copy(
        update={
            "run": absolute(config.run_uri),
            "prior": absolute(config.prior_uri),
            "root": absolute(config.storage.root),
        }
    )
    images = tuple(absolute(address) for address in config.subject.instance_images)
    subject = config.subject.model_copy(update={"instance_images": images})
    changes: dict[str, Any] = {"storage": storage, "subject": subject}
    if is_file_address(config.base_model):
        changes["base_model"] = absolute_file(config.base_model)
    elif config.base_model not in BASES:
        changes["base_model"] = _absolute_folder(config.base_model)
    if (second := config.super_resolution.base_model) is not None and second not in BASES:
        update = {"base_model": _absolute_folder(second)}
        changes["super_resolution"] = config.super_resolution.model_copy(update=update)
    real = config.evaluation.real_images
    encoders = {name: getattr(config.evaluation, name) for name in ("image_encoder", "dino", "clip", "lpips")}
    changes["evaluation"] = config.evaluation.model_copy(
        update={"real_images": None if real is None else tuple(absolute(address) for address in real)}
        | {name: _absolute_folder(address) for name, address in encoders.items() if address is not None}
    )
    return config.model_copy(update=changes)


def _absolute_folder(address: str) -> str:
    """A folder's absolute path; other values (a hub id, a remote address) unchanged."""
    folder = Path(address).expanduser()
    return str(folder.absolute()) if folder.is_dir() else address
