"""The published model of a subject, and the last step's weights beside one that is a moving average."""

from dreambooth.config.settings import DreamBoothConfig
from pipelines.storage.files import join
from pipelines.storage.publications import Manifest, published


def find_model(config: DreamBoothConfig, key: str) -> Manifest | None:
    """The published model of a plan's key, or None."""
    manifest = published(join(config.run_uri, "model"))
    return manifest if manifest is not None and manifest.metadata.get("key") == key else None


def unaveraged_uri(run_uri: str, key: str) -> str:
    """Where the last step's weights are published, as a delta, of a model that is a moving average."""
    return join(run_uri, "unaveraged", key)


def find_unaveraged(model: Manifest) -> Manifest | None:
    """The publication of the last step's weights of a model, or None if they weren't kept."""
    run_uri, found, _ = model.uri.rpartition("/model/")
    return published(unaveraged_uri(run_uri, str(model.metadata.get("key")))) if found else None
