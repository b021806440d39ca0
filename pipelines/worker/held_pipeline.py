"""The one pipeline a sampler holds: a base's or a published model's, with its own or given weights."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.models.base_model import resolve_base_model
from pipelines.storage.publications import opened
from pipelines.tasks import Source


@dataclass(frozen=True, kw_only=True, eq=False)
class _Given:
    """Trained weights in memory: `source` is `base`'s pipeline with them."""

    source: Source
    base: Source
    state: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Held:
    """A loaded pipeline, by its files and its weights' dtype.

    `given` weights replace its `own`, kept here.
    """

    files: Source
    dtype: Any
    pipeline: Any
    given: _Given | None = None
    own: dict[str, Any]


class HeldPipeline:
    """Keeps the last pipeline loaded while the next one has the same files, and swaps given weights in and out."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._held: _Held | None = None
        self._given: _Given | None = None

    @property
    def loaded(self) -> bool:
        """Whether a pipeline is loaded."""
        return self._held is not None

    def give(self, source: Source, base: Source, state: dict[str, Any]) -> None:
        """Make `source` the base's pipeline with these weights, an engine's state_dict."""
        self._given = _Given(source=source, base=base, state=state)

    def get(self, source: Source, dtype: str) -> Any:
        """The pipeline of a source, for sampling in `dtype`.

        Raises RuntimeError if the local base has another hash than the source.
        """
        import torch

        from dreambooth.sampling.sampler import weights_dtype

        given = self._given if self._given is not None and self._given.source == source else None
        files = source if given is None else given.base
        weights = weights_dtype(self._device, getattr(torch, dtype))
        held, self._held = self._held, None  # after a failure halfway, load again
        if held is None or (held.files, held.dtype) != (files, weights):
            if held is not None:
                held = None  # freed before the next one takes its place
                gc.collect()  # modules hold themselves in circles
            held = _Held(files=files, dtype=weights, pipeline=_load(files, self._device, weights), own={})
        self._held = _with_weights(held, given)
        return self._held.pipeline


def _with_weights(held: _Held, given: _Given | None) -> _Held:
    """Put given weights into the pipeline, or its own back."""
    from dreambooth.models.export import put_weights

    if held.given is given:
        return held
    if held.given is not None:
        put_weights(held.pipeline, held.own)
    own = {} if given is None else put_weights(held.pipeline, given.state)
    return _Held(files=held.files, dtype=held.dtype, pipeline=held.pipeline, given=given, own=own)


def _load(source: Source, device: str, dtype: Any) -> Any:
    from dreambooth.sampling.sampler import load_pipeline

    second = None if source.super_resolution is None else _base_directory(source.super_resolution, scales_up=True)
    with _directory(source) as directory:
        return load_pipeline(
            directory,
            device=device,
            dtype=dtype,
            super_resolution=second,
            noise_levels=source.noise_levels,
            alone=not source.published,
            only_second=source.only_second,
        )


@contextmanager
def _directory(source: Source) -> Iterator[Path]:
    """A pipeline's folder on this machine, within this context."""
    if source.published:
        with opened(source.address) as directory:
            yield directory
        return
    yield _base_directory(source)


def _base_directory(source: Source, *, scales_up: bool = False) -> Path:
    base = resolve_base_model(source.address, source.revision, scales_up=scales_up)
    if source.base_hash not in (None, base.hash):
        raise RuntimeError(
            f"{source.address} has hash {base.hash} here, and {source.base_hash} at the driver; use one copy"
        )
    return base.directory
