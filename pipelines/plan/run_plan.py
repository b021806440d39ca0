"""The plan of one run, made before work starts, and the key of its result."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dreambooth.config.settings import DreamBoothConfig, config_hash
from dreambooth.data.buckets import sizes_of, with_base
from dreambooth.data.identifier import check_own_tokens, choose_identifier, describe
from dreambooth.data.images import InstanceImage, Size
from dreambooth.data.inspection import Inspect, Inspection, inspect_addresses
from dreambooth.data.repeats import repeats_of
from dreambooth.errors import InputError
from dreambooth.evaluation.run_texts import check_texts
from dreambooth.models.base_model import BaseModel, resolve_base_model
from dreambooth.models.cascade import check_cascade
from dreambooth.sampling.best_dtype import best_dtype
from dreambooth.sampling.class_images import PriorPlan, prior_plan
from pipelines.cluster.ray_cluster import Resources, local_resources
from pipelines.plan.counted import optimizer_bytes
from pipelines.plan.engine_choice import choose_engine, choose_precision
from pipelines.plan.footprint import Footprint
from pipelines.plan.local_addresses import local_addresses, with_absolute_addresses
from pipelines.plan.result_key import identifier_tokens, result_key
from pipelines.plan.second_stage import check_text_encoders, scored_like
from pipelines.stages.evaluate_stage import check_protocol, compared_images
from pipelines.stages.evaluation_task import EvaluationTask, Measured, pictures_hash, protocol_task, samples_task


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A configuration with every open choice made, and the facts behind them.

    `key` identifies the result: the hash of everything that decides the trained weights. `sampling_dtype` is the dtype
    of pictures on every machine, and part of their keys. Samples are measured against the images `compared`. `second`
    is the plan of a cascade's second stage, as if it were a base model, and part of the key; all else is of the first.
    `sizes` are those that each of the `images` is cut to.
    """

    config: DreamBoothConfig
    base: BaseModel
    images: tuple[InstanceImage, ...]
    data_hash: str
    compared: Inspection
    prior: PriorPlan | None
    engine: str
    use_gpu: bool
    sampling_dtype: str
    key: str
    warnings: tuple[str, ...]
    second: "Plan | None" = None
    sizes: tuple[Size, ...] = ()

    @property
    def stages(self) -> "tuple[Plan, ...]":
        """This plan, and that of a second stage if there is one: what is trained, one after the other."""
        return (self,) if self.second is None else (self, self.second)

    @property
    def bases(self) -> tuple[BaseModel, ...]:
        """The base model, and that of a second stage if there is one."""
        return tuple(stage.base for stage in self.stages)

    @property
    def has_weights(self) -> bool:
        """Whether all weights of its base models are here; if not, it is a plan to look at."""
        return all(base.has_weights for base in self.bases)

    @property
    def base_hash(self) -> str:
        """Hash of all that the base model's pictures come from: the base, and a second stage if there is one."""
        return pictures_hash(*(base.hash for base in self.bases))

    @property
    def model_key(self) -> str:
        """Key of the registered model: the weights and its sampling settings."""
        evaluation = self.config.evaluation
        return config_hash(self.key, str(evaluation.num_inference_steps), str(evaluation.guidance_scale))

    @property
    def samples(self) -> EvaluationTask | None:
        """The samples for the eye, if any are asked for."""
        return samples_task(self.config, self.images, self.data_hash, **self._measured)

    @property
    def protocol(self) -> EvaluationTask | None:
        """The task of the paper's protocol, if any."""
        return protocol_task(self.config, self.compared, **self._measured)

    @property
    def evaluations(self) -> tuple[EvaluationTask, ...]:
        """All that is measured of the model."""
        return tuple(task for task in (self.samples, self.protocol) if task is not None)

    @property
    def _measured(self) -> Measured:
        return {
            "model_key": self.key,
            "base_hash": self.base_hash,
            "dtype": self.sampling_dtype,
            "sampler": self.base.family.sampler_name,
        }

    @property
    def trained_parameters(self) -> int:
        """Number of fine-tuned parameters."""
        if self.config.train.method == "textual_inversion":
            tokens = len(set(identifier_tokens(self.config, self.base)))
            return tokens * sum(self.base.embedding_width(folder) for folder in self.run_text_encoders)
        return self._run_parameters

    @cached_property
    def run_text_encoders(self) -> tuple[str, ...]:
        """Folders of the text encoders that every training step runs; all are trained but with Textual Inversion."""
        return self.base.run_text_encoders(self.config.train)

    @property
    def trains_text_encoders(self) -> bool:
        """Whether weights of text encoders are trained."""
        return self.config.train.method == "dreambooth" and bool(self.run_text_encoders)

    @property
    def _run_parameters(self) -> int:
        """Number of parameters of the modules that every training step runs."""
        counts = self.base.parameter_counts
        return sum(counts[folder] for folder in (self.base.family.denoiser.folder, *self.run_text_encoders))

    @property
    def zero_stage(self) -> int:
        """ZeRO's stage; 0 where PyTorch trains."""
        return self.config.zero.stage if self.engine == "deepspeed" else 0

    @property
    def footprint(self) -> Footprint:
        """What the memory of a worker follows from."""
        train, zero = self.config.train, self.config.zero
        moments, update = self._optimizer_bytes
        return Footprint(
            trained=self.trained_parameters,
            frozen=self._run_parameters if train.method == "textual_inversion" else 0,
            moments=moments,
            update=update,
            average=train.ema_decay is not None,
            fused_backward=train.fused_backward,
            offload_optimizer=zero.offload_optimizer,
            offload_parameters=zero.offload_parameters,
            accumulates=train.gradient_accumulation_steps > 1,
            weight=2 if zero.weights == "bf16" else 4,
        )

    @cached_property
    def _optimizer_bytes(self) -> tuple[int, int]:
        """Bytes of the optimizer's state, and of the largest parameter's update beside it."""
        train = self.config.train
        if train.optimizer == "adamw" or train.method == "textual_inversion":
            return 8 * self.trained_parameters, 0
        return optimizer_bytes(self.base, train.optimizer, self.run_text_encoders)

    @property
    def model_state_bytes(self) -> int:
        """Weights, gradients, masters, moments and moving average of one worker, activations not counted.

        Of this stage alone: the other's are not there at the same time.
        """
        return self.footprint.state_bytes(self.zero_stage, self.config.cluster.num_workers)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint of this stage, summed over workers.

        Weights, the optimizer's moments and the moving average. ZeRO 1 and 2 store the weights twice, in the model's
        file and as the shards' masters. DeepSpeed also writes frozen weights, and without ZeRO every rank writes the
        whole moving average.
        """
        train, trained = self.config.train, self.trained_parameters
        stage = self.zero_stage
        counts, embedding_only = self.base.parameter_counts, train.method == "textual_inversion"
        text_encoders = sum(counts[folder] for folder in self.run_text_encoders)
        copies = self.config.cluster.num_workers if self.engine == "deepspeed" and stage == 0 else 1
        each = 4 + (self.footprint.weight if stage in (1, 2) else 0) + (4 * copies if train.ema_decay else 0)
        frozen = self._run_parameters if embedding_only and self.engine == "deepspeed" else 0
        best = text_encoders if embedding_only else trained
        return each * trained + self._optimizer_bytes[0] + 4 * frozen + (4 * best if train.keep == "best" else 0)

    @property
    def published_bytes(self) -> int:
        """Bytes of the published model, all stages; of the last step's weights beside it the most there can be."""
        parameters = sum(sum(stage.base.parameter_counts.values()) for stage in self.stages)
        copies = 2 if self.config.train.keep_unaveraged else 1
        return copies * parameters * (4 if self.config.storage.dtype == "float32" else 2)


def make_plan(
    config: DreamBoothConfig,
    resources: Resources | None = None,
    *,
    base: BaseModel | None = None,
    second_base: BaseModel | None = None,
    identifier: str | None = None,
    weights: bool = True,
    inspect: Inspect = inspect_addresses,
) -> Plan:
    """Check all requirements of a run and make the open choices. Raises InputError for any fault.

    `resources` None means this machine's. A batch passes its shared `base`, and `second_base` of a cascade, and an
    `identifier` chosen among all subjects. Without `weights` those of the base may be missing: for a plan to look at.
    """
    resources = resources or local_resources()
    first = _stage_plan(config, resources, base, identifier, weights=weights, inspect=inspect)
    if (own := first.config.second_stage) is None:
        return first
    second_base = second_base or resolve_base_model(own.base_model, own.revision, scales_up=True, weights=weights)
    side, large = int(first.config.images.resolution or 0), own.images.resolution or second_base.resolution
    check_cascade(first.base, second_base, sides=(side, large))
    if own.super_resolution.noise_levels is not None:
        second_base.family.check_noise_levels(second_base.directory, own.super_resolution.noise_levels)
    check_text_encoders(first.config, first.run_text_encoders, second_base)
    own = scored_like(first.config, own)
    try:
        second = _stage_plan(own, resources, second_base, None, weights=weights, inspect=inspect)
    except InputError as error:  # the setting of that name is the first stage's
        raise InputError(str(error).replace("images.resolution", "super_resolution.resolution")) from None
    if second.config.train.by_score:  # of pictures that the first stage draws
        second = replace(second, key=config_hash(first.key, second.key))
    settings = first.config.super_resolution.model_copy(update={"resolution": large})
    further = [f"super_resolution: {warning}" for warning in second.warnings if warning not in first.warnings]
    return replace(
        first,
        config=first.config.model_copy(update={"super_resolution": settings}),
        second=second,
        key=config_hash(first.key, second.key),
        warnings=(*first.warnings, *further),
    )


def _stage_plan(
    config: DreamBoothConfig,
    resources: Resources,
    base: BaseModel | None,
    identifier: str | None,
    *,
    weights: bool,
    inspect: Inspect,
) -> Plan:
    """The plan of one stage."""
    resources.check(config.cluster)
    _check_actors(config, resources)
    use_gpu = resources.use_gpu(config.cluster)
    config = with_absolute_addresses(config)
    base = base or resolve_base_model(config.base_model, config.revision, weights=weights)
    config = with_defaults_of(config, base)
    inspection = inspect(
        config.subject.instance_images,
        resolution=config.images.resolution or base.resolution,
        max_pixels=config.images.max_pixels,
        masked=config.images.masked,
        buckets=sizes_of(config.images, base.settings),
    )
    repeats_of(inspection.images, config.images.repeats)
    tokenizer = base.tokenizer
    warnings = list(inspection.warnings)
    if config.subject.identifier is None:
        identifier = identifier or choose_identifier(tokenizer, subject_name=config.subject.name)
    else:
        identifier = config.subject.identifier
        if (warning := describe(tokenizer, identifier).warning) is not None:
            warnings.append(warning)
    config = config.model_copy(
        update={
            "subject": config.subject.model_copy(update={"identifier": identifier}),
            "images": with_base(config.images, base.settings),
            "train": config.train.model_copy(update={"mixed_precision": choose_precision(config, resources)}),
        }
    )
    shared = check_own_tokens(
        tokenizer, config.subject, config.prompts, learnt_apart=config.train.learns_identifier_apart
    )
    warnings += [warning for warning in (shared, base.settings.warning) if warning is not None]
    if resources.nodes > 1 and (local := local_addresses(config)):
        warnings.append(
            f"the cluster has {resources.nodes} nodes, and these are local paths: {', '.join(local)}; unless all nodes "
            f"share them, use an address such as s3://bucket/folder"
        )
    dtype = best_dtype("cuda" if use_gpu else "cpu")
    prior, engine = _prior(config, base, dtype), choose_engine(config, gpus_have_bf16=resources.gpus_have_bf16)
    check_protocol(config)
    compared = compared_images(config, inspection, inspect)
    warnings += [*compared.warnings, *check_texts(config, inspection.images, base.text_readers)]
    return Plan(
        config=config,
        base=base,
        images=inspection.images,
        data_hash=inspection.data_hash,
        sizes=inspection.sizes,
        compared=compared,
        prior=prior,
        engine=engine,
        use_gpu=use_gpu,
        sampling_dtype=dtype,
        key=result_key(config, base, inspection.data_hash, prior, engine, use_gpu=use_gpu),
        warnings=tuple(warnings),
    )


def with_defaults_of(config: DreamBoothConfig, base: BaseModel) -> DreamBoothConfig:
    """A configuration with the defaults of the base model's family where nothing was given.

    Raises InputError for a setting that has no meaning for it.
    """
    if config.train.min_snr_gamma is not None and not base.family.min_snr:
        raise InputError(
            f"train.min_snr_gamma is {config.train.min_snr_gamma}, but a {base.family.name} model is trained as a "
            f"rectified flow, in which min-SNR weighting has no meaning; leave it out"
        )
    defaults = base.family.defaults_of(base.settings)
    sampling = {"num_inference_steps": defaults.num_inference_steps, "guidance_scale": defaults.guidance_scale}
    suited: dict[str, dict[str, Any]] = {
        "train": {"learning_rate": defaults.learning_rate, "max_train_steps": defaults.max_train_steps},
        "prior": sampling,
        "evaluation": sampling,
    }
    changed = {}
    for group, values in suited.items():
        settings = getattr(config, group)
        missing = {name: value for name, value in values.items() if name not in settings.model_fields_set}
        changed[group] = settings.model_copy(update=missing)
    return config.model_copy(update=changed)


def _check_actors(config: DreamBoothConfig, resources: Resources) -> None:
    wanted = config.prior.num_actors
    room = resources.gpus if resources.use_gpu(config.cluster) else resources.cpus
    if wanted is not None and wanted > room:
        raise InputError(
            f"prior.num_actors is {wanted}, but the cluster has room for {room}, one per "
            f"{'GPU' if resources.use_gpu(config.cluster) else 'CPU'}; ask for fewer, or leave it out"
        )


def _prior(config: DreamBoothConfig, base: BaseModel, dtype: str) -> PriorPlan | None:
    if not config.prior.enabled:
        return None
    return prior_plan(
        config.prior,
        base_hash=base.hash,
        class_prompt=config.prompts.class_prompt(config.subject),
        resolution=config.images.resolution or base.resolution,
        dtype=dtype,
        sampler=base.family.sampler_name,
    )
