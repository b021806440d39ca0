"""Publish what was fine-tuned: every stage's record, and one verified model of all of them."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.config.addresses import shown
from dreambooth.models.base_model import BaseModel
from dreambooth.models.cascade import SUPER_RESOLUTION
from pipelines.cluster.logs import log
from pipelines.cluster.metrics import record
from pipelines.stages.published_model import unaveraged_uri
from pipelines.storage.faults import room_for
from pipelines.storage.files import join, write_json
from pipelines.storage.publications import Manifest, opened, publish
from pipelines.tasks import TrainTask
from pipelines.worker.fine_tune import FineTuned

_FOLDERS = ("", SUPER_RESOLUTION)
"""Folders of a model's stages within it."""


@dataclass(frozen=True, kw_only=True)
class TrainedStage:
    """A base model, or the second stage of one, and what was made of it."""

    task: TrainTask
    base: BaseModel
    tuned: FineTuned


def publish_result(stages: Sequence[TrainedStage]) -> Manifest:
    """Write the records, and publish the model after verifying it; on rank 0. A second stage has a folder in the first.

    Raises StorageFull if there is no room.
    """
    began, config = time.perf_counter(), stages[0].task.config
    with room_for("the model", config.run_uri):
        for stage in stages:
            write_json(join(config.run_uri, "training", f"{stage.task.key}.json"), stage.tuned.record)
        if all(stage.tuned.unaveraged is not None for stage in stages):
            _publish_unaveraged(stages)  # first, as the model's own manifest says that a result is whole
        manifest = _export(stages)
    seconds = time.perf_counter() - began
    record("dreambooth_publish_seconds", seconds)
    log("published", uri=manifest.uri, seconds=round(seconds, 3))
    return manifest


def published_weights(stages: Sequence[TrainedStage]) -> dict[str, Any]:
    """Parameters of all stages by name in the published dtype; a second one's are named `super_resolution.…`."""
    return {
        f"{prefix}{name}": parameter.to(_dtype(stages))
        for stage, prefix in zip(stages, ("", f"{SUPER_RESOLUTION}."), strict=False)
        for name, parameter in stage.tuned.state.items()
    }


def _export(stages: Sequence[TrainedStage]) -> Manifest:
    """Publish the fine-tuned pipeline after reading it back and verifying it."""
    config = stages[0].task.config
    states = [stage.tuned.state for stage in stages]
    with tempfile.TemporaryDirectory(prefix="dreambooth-export-") as folder:
        _write(stages, states, Path(folder, "model"))

        def verify(manifest: Manifest) -> None:
            with opened(manifest) as directory:
                _verify(stages, states, directory)

        return publish(Path(folder, "model"), join(config.run_uri, "model"), metadata=_metadata(stages), verify=verify)


def _publish_unaveraged(stages: Sequence[TrainedStage]) -> None:
    """Publish the last step's weights as their change against the base, once per key: an average replaces them."""
    from dreambooth.models.delta import write_delta

    task = stages[0].task
    states = [stage.tuned.unaveraged or {} for stage in stages]
    with tempfile.TemporaryDirectory(prefix="dreambooth-export-") as folder:
        model, delta = Path(folder, "model"), Path(folder, "delta")
        _write(stages, states, model)
        _verify(stages, states, model)
        write_delta(stages[0].base, model, delta, second=stages[1].base if len(stages) > 1 else None)
        metadata = {"key": task.key, "step": stages[0].tuned.record["steps"]}
        publish(delta, unaveraged_uri(task.config.run_uri, task.key), metadata=metadata)


def _write(stages: Sequence[TrainedStage], states: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write a model of given weights of every stage."""
    from dreambooth.models.export import export_pipeline

    with room_for("the model", tempfile.gettempdir()):
        for stage, state, name in zip(stages, states, _FOLDERS, strict=False):
            export_pipeline(
                stage.base.directory,
                state,
                folder / name,
                dtype=_dtype(stages),
                resolution=stage.task.config.images.resolution,
                noise_levels=stage.task.config.super_resolution.noise_levels,
            )


def _verify(stages: Sequence[TrainedStage], states: Sequence[Mapping[str, Any]], directory: Path) -> None:
    from dreambooth.models.export import verify_export

    for stage, state, name in zip(stages, states, _FOLDERS, strict=False):
        verify_export(directory / name, stage.base.directory, state, dtype=_dtype(stages))


def _dtype(stages: Sequence[TrainedStage]) -> Any:
    import torch

    return getattr(torch, stages[0].task.config.storage.dtype)


def _metadata(stages: Sequence[TrainedStage]) -> dict[str, Any]:
    task, config = stages[0].task, stages[0].task.config
    metadata = {
        "key": task.key,
        "subject": config.subject.name,
        "identifier": config.subject.identifier,
        "class_noun": config.subject.class_noun,
        "data_hash": task.data_hash,
        "prior_set": task.prior_set.key if task.prior_set else None,
        "num_inference_steps": config.evaluation.num_inference_steps,
        "guidance_scale": config.evaluation.guidance_scale,
        **_of_stage(stages[0]),
    }
    return metadata if len(stages) == 1 else metadata | {SUPER_RESOLUTION: _of_stage(stages[1])}


def _of_stage(stage: TrainedStage) -> dict[str, Any]:
    config = stage.task.config
    return {
        "base_model": shown(config.base_model),
        "base_hash": stage.task.base_hash,
        "resolution": config.images.resolution,
        "step": stage.tuned.record["exported_step"],
        "ema_decay": config.train.ema_decay,
    }
