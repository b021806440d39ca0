"""`dreambooth evaluate`: measure one published model.

Subject, identifier, base model and resolution are read from its manifest and its run, so only the instance images are
needed. Pictures of its run are reused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.config.overrides import merge
from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.buckets import sizes_of, with_base
from dreambooth.data.inspection import inspect_addresses
from dreambooth.errors import InputError
from dreambooth.evaluation.prompts import OWN, read_prompts
from dreambooth.evaluation.run_texts import check_evaluation
from dreambooth.models.base_model import BaseModel, resolve_base_model
from dreambooth.models.cascade import SUPER_RESOLUTION
from dreambooth.models.text_readers import text_readers
from dreambooth.sampling.best_dtype import best_dtype
from pipelines.apps.generate import find_published, registered_address
from pipelines.cluster.ray_cluster import ray_cluster
from pipelines.driver.cards import add_figures
from pipelines.driver.console import RunConsole
from pipelines.report.model_card import description
from pipelines.stages.evaluate_stage import check_protocol, compared_images, evaluate
from pipelines.stages.evaluation_task import pictures_hash, protocol_task
from pipelines.storage.files import absolute, check_writable
from pipelines.storage.publications import Manifest, read_manifest
from pipelines.tasks import Source, base_source
from pipelines.tracking.client import check_connection, connect, quietly, resolve_tracking_uri
from pipelines.tracking.evaluation_record import RecordedFigures, pass_gate, record_evaluation
from pipelines.tracking.registry import MOST_DESCRIPTION, RegisteredVersion, describe, version_of
from pipelines.tracking.tracked_run import TrackedRun
from pipelines.worker.sampler_pool import SamplerPool

_NAMED = ("auto", "dreambench", "miniature")
_FROM_RUN = (
    "revision",
    "super_resolution.revision",
    "storage.prior",
    "evaluation.seed",
    "prompts.class",
    "images.aspect_buckets",
    "images.bucket_step",
    "images.bucket_max_aspect_ratio",
)
"""Settings that only the run has, where there is one."""


@dataclass(frozen=True, kw_only=True)
class MeasurableModel:
    """A published model and its registration, if any."""

    manifest: Manifest
    registered: RegisteredVersion | None
    run: TrackedRun | None
    params: Mapping[str, str]


def evaluate_model(
    model: str,
    instance_images: str,
    *,
    prompts: str = "auto",
    overrides: tuple[str, ...] = (),
    force: bool = False,
    tracking_uri: str | None = None,
    console: RunConsole | None = None,
) -> RecordedFigures:
    """Measure a model by the paper's protocol, record its figures and let the gate judge it.

    `model` is `models:/NAME@ALIAS`, `models:/NAME/VERSION` or the address of a published model; `prompts` is `auto`,
    `dreambench`, `miniature` or a text file with one prompt per line. Raises InputError for invalid input before any
    work starts.
    """
    console = console or RunConsole()
    found = find_measurable(model, tracking_uri)
    config = _config(found, instance_images, prompts, overrides)
    base = resolve_base_model(config.base_model, config.revision)
    inspection = inspect_addresses(
        config.subject.instance_images,
        resolution=int(config.images.resolution or 0),
        max_pixels=config.images.max_pixels,
        masked=config.images.masked,
        buckets=sizes_of(config.images, base.settings),
    )
    compared = compared_images(config, inspection)
    checked = check_evaluation(config, text_readers(base.directory))
    for warning in (*inspection.warnings, *compared.warnings, *checked):
        console.warn(warning)
    with ray_cluster(config.cluster) as resources:
        use_gpu = resources.use_gpu(config.cluster)
        metadata = found.manifest.metadata
        task = protocol_task(
            config,
            compared,
            model_key=metadata["key"],
            base_hash=pictures_hash(metadata["base_hash"], _second_hash(metadata)),
            dtype=best_dtype("cuda" if use_gpu else "cpu"),
            sampler=base.family.sampler_name,
        )
        assert task is not None
        pool = SamplerPool(
            actors=config.prior.num_actors or (resources.gpus if use_gpu else resources.cpus),
            use_gpu=use_gpu,
            graph=config.cluster.graph_sampling,
        )
        wanted = len(task.base_sets) + len(task.fine_tuned_sets)
        with console.bar("samples") as update, pool.started(wanted) as samplers:
            evaluation = evaluate(
                task,
                samplers,
                base=base_source(config, metadata["base_hash"], _second_hash(metadata)),
                fine_tuned=Source(address=found.manifest.uri, published=True),
                on_progress=lambda made, total: update(made, total, "images"),
            )
    decision, card = None, add_figures(found.manifest, evaluation)
    if found.run is not None and found.registered is not None:
        record_evaluation(found.run, found.registered, evaluation)
        if card is not None:
            client, version = connect(found.run.tracking_uri), found.registered
            with quietly():
                describe(client, version.name, version.version, description(card.facts, most=MOST_DESCRIPTION))
        decision = pass_gate(
            found.run.tracking_uri, found.registered, config.gate, evaluation["bank"]["name"], force=force
        )
    return RecordedFigures(uri=task.uri, evaluation=evaluation, gate=decision)


def find_measurable(model: str, tracking_uri: str | None) -> MeasurableModel:
    """A model that says what it was made of. Raises InputError for a missing one, and one that doesn't."""
    if not model.startswith("models:"):
        manifest = find_published(model)
        if "key" not in manifest.metadata:
            raise InputError(
                f"{model!r} doesn't record what it was made from; expected a model that 'dreambooth run' made"
            )
        return MeasurableModel(manifest=manifest, registered=None, run=None, params={})
    uri = resolve_tracking_uri(tracking_uri)
    client = check_connection(uri)
    with quietly():
        registered, tags, run_id = version_of(client, registered_address(client, model))
        published = tags.get("published")
        if published is None or run_id is None:
            raise InputError(
                f"{registered.uri} wasn't registered by this project: it doesn't record where its files are"
            )
        run = client.get_run(run_id)
    return MeasurableModel(
        manifest=read_manifest(published),
        registered=registered,
        run=TrackedRun(uri, run),
        params=run.data.params,
    )


def _second_hash(metadata: Mapping[str, Any]) -> str | None:
    """Hash of the second stage's base, of a model that has one."""
    second = metadata.get(SUPER_RESOLUTION)
    return None if second is None else str(second["base_hash"])


def _check_hash(base: BaseModel, expected: str, setting: str) -> None:
    if base.hash != expected:
        raise InputError(
            f"the model was made from a base model of hash {expected}, and {base.address} has {base.hash} here; name "
            f"the one it was made from with --set {setting}=..."
        )


def _config(model: MeasurableModel, instance_images: str, prompts: str, overrides: tuple[str, ...]) -> DreamBoothConfig:
    """The model's configuration, from its manifest, its run and the request."""
    settings, metadata = settings_of(model, instance_images), model.manifest.metadata
    chosen: dict[str, Any] = {"protocol": prompts}
    if prompts not in _NAMED:
        chosen = {"protocol": OWN, "prompts": list(read_prompts(Path(prompts)))}
    config = load_config(merge(settings, {"evaluation": chosen}), overrides)
    if config.evaluation.protocol == "none":
        raise InputError("evaluation.protocol is 'none', which measures nothing; leave it out, or give --prompts")
    check_protocol(config)
    base = resolve_base_model(config.base_model, config.revision)
    _check_hash(base, metadata["base_hash"], "base_model")
    if (own := config.second_stage) is not None:
        found = resolve_base_model(own.base_model, own.revision, scales_up=True)
        _check_hash(found, str(_second_hash(metadata)), "super_resolution.base_model")
    for place in (config.run_uri, config.prior_uri):
        check_writable(place)
    return config.model_copy(update={"images": with_base(config.images, base.settings)})


def settings_of(model: MeasurableModel, instance_images: str) -> dict[str, Any]:
    """Settings of the run that made a model, from its manifest and its run, with the subject's images."""
    metadata, params = model.manifest.metadata, model.params
    settings: dict[str, Any] = {
        "subject": {
            "name": metadata["subject"],
            "class_noun": metadata["class_noun"],
            "identifier": metadata["identifier"],
            "instance_images": absolute(instance_images),
        },
        "base_model": metadata["base_model"],
        "images": {"resolution": metadata.get("resolution")},
        "storage": {"run": model.manifest.uri.rsplit("/model/", 1)[0]},
        "evaluation": {
            "protocol": "auto",
            "num_inference_steps": metadata["num_inference_steps"],
            "guidance_scale": metadata["guidance_scale"],
        },
    }
    if (second := metadata.get(SUPER_RESOLUTION)) is not None:
        settings[SUPER_RESOLUTION] = {name: second[name] for name in ("base_model", "resolution")}
    for place in _FROM_RUN:
        if params.get(place, "None") != "None":
            value: Any = params[place]
            for key in reversed(place.split(".")):
                value = {key: value}
            settings = merge(settings, value)
    return settings
