"""Which weights of a model are exported: as published, or the last step's, which a moving average replaced.

A run with `train.keep_unaveraged` publishes them beside, as their change against the base.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dreambooth.errors import InputError
from pipelines.apps.export.progress import counted_bytes, in_megabytes
from pipelines.driver.console import RunConsole
from pipelines.stages.published_model import find_unaveraged
from pipelines.storage.files import is_local
from pipelines.storage.publications import Manifest, opened


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model's publication, and that of its last step's weights where those are exported instead."""

    manifest: Manifest
    unaveraged: Manifest | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """What a file says in its header of the average: its decay, or that it has none."""
        if self.unaveraged is not None:
            return {"step": str(self.unaveraged.metadata["step"])}
        names = ("step", "ema_decay")
        return {name: str(value) for name in names if (value := self.manifest.metadata.get(name)) is not None}


def choose_weights(manifest: Manifest, ema: bool | None) -> Weights:
    """The weights of `--ema` (True), `--no-ema` (False), or as published (None).

    Raises InputError for an average of a model without one, and for weights that weren't kept.
    """
    if ema is None:
        return Weights(manifest=manifest)
    what = "--ema" if ema else "--no-ema"
    if "ema_decay" not in manifest.metadata:
        raise InputError(
            f"{manifest.uri} doesn't say whether its weights are a moving average; leave {what} out to export them as "
            f"they are, or publish the model again with 'dreambooth run'"
        )
    decay = manifest.metadata["ema_decay"]
    if decay is None:
        if ema:
            raise InputError(
                f"{manifest.uri} was trained without a moving average, so there is none to export; leave --ema out, or "
                f"train with --set train.ema_decay=0.999"
            )
        return Weights(manifest=manifest)
    if ema:
        return Weights(manifest=manifest)
    unaveraged = find_unaveraged(manifest)
    if unaveraged is None:
        raise InputError(
            f"{manifest.uri} has the moving average alone (train.ema_decay={decay}); the last step's weights are kept "
            f"by a run with --set train.keep_unaveraged=true"
        )
    return Weights(manifest=manifest, unaveraged=unaveraged)


@contextmanager
def opened_weights(weights: Weights, console: RunConsole) -> Iterator[Path]:
    """A folder with the chosen weights as a diffusers directory, within this context; with a bar for a download."""
    if weights.unaveraged is None:
        with _opened(weights.manifest, console) as directory:
            yield directory
        return
    from dreambooth.models.delta import rebuild

    with _opened(weights.unaveraged, console) as delta, tempfile.TemporaryDirectory(prefix="dreambooth-model-") as made:
        with console.bar("rebuilt") as bar:
            rebuild(delta, Path(made), on_progress=in_megabytes(bar))
        yield Path(made)


@contextmanager
def _opened(manifest: Manifest, console: RunConsole) -> Iterator[Path]:
    total = 0 if is_local(manifest.uri) else sum(record.size for record in manifest.files.values())
    with ExitStack() as stack:
        with counted_bytes(console, "download", total) as counted:
            directory = stack.enter_context(opened(manifest, on_bytes=counted.add))
        yield directory
