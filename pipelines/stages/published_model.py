"""The published model of a subject."""

from dreambooth.config.settings import DreamBoothConfig
from pipelines.storage.files import join
from pipelines.storage.publications import Manifest, published


def find_model(config: DreamBoothConfig, key: str) -> Manifest | None:
    """The published model of a plan's key, or None."""
    manifest = published(join(config.run_uri, "model"))
    return manifest if manifest is not None and manifest.metadata.get("key") == key else None
