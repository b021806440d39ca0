"""All settings of a run, as frozen pydantic models, and their validation.

Defaults are for Stable Diffusion; miniatures.py holds the differences for the built-in base models. `load_config` reads
YAML and dotted overrides, and raises `InputError` for any fault before work starts.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from dreambooth.config.addresses import check_address, holds_credentials, shown
from dreambooth.config.bounds import (
    Count,
    Graph,
    Guidance,
    NoiseLevels,
    Number,
    Rate,
    Resolution,
    Retries,
    SamplingSteps,
    Seed,
    Whole,
)
from dreambooth.config.evaluation import EvaluationConfig, GateConfig
from dreambooth.config.explain import explain
from dreambooth.config.images import ImagesConfig
from dreambooth.config.limits import MOST_IMAGES, MOST_STEPS, SAMPLED_TOGETHER
from dreambooth.config.miniatures import setting_of, with_miniature_defaults
from dreambooth.config.overrides import merge, parse_override, read_yaml
from dreambooth.config.sections import read_sections
from dreambooth.config.service_names import ExperimentName, ModelName
from dreambooth.config.subject import Frozen, PromptTemplates, Subject, Words
from dreambooth.config.train import TrainConfig
from dreambooth.errors import InputError


def _check_without_secret(address: str) -> str:
    if holds_credentials(address):
        raise ValueError(
            f"{shown(address)} holds a name, a password or a token, and results say where they lie; leave it out, and "
            f"pass it through its driver's variables (AWS_ACCESS_KEY_ID, FSSPEC_FTP_PASSWORD, …)"
        )
    return address


Place = Annotated[str, AfterValidator(partial(check_address, what="the address"))]
OpenPlace = Annotated[Place, AfterValidator(_check_without_secret)]


class PriorConfig(Frozen):
    """The class images of prior preservation (paper, section 3.2)."""

    prior_loss_weight: Number = Field(
        1.0, ge=0, le=1000, description="weight of the prior-preservation loss, the paper's lambda; 0 turns it off"
    )
    num_class_images: Whole = Field(
        200, ge=1, le=MOST_IMAGES, description="class images per set, shared by all subjects of the class"
    )
    num_inference_steps: SamplingSteps = Field(25, description="sampling steps of class images")
    guidance_scale: Guidance = Field(7.5, description="classifier-free guidance of class images")
    batch_size: Count = Field(SAMPLED_TOGETHER, description="images sampled together; part of the set's key")
    num_actors: Count | None = Field(
        None, description="parallel samplers of `dreambooth evaluate`; null: as many as the cluster has room for"
    )
    seed: Seed = Field(0, description="seed of the class images")

    @property
    def enabled(self) -> bool:
        """Whether prior preservation is on."""
        return self.prior_loss_weight > 0


class ZeroConfig(Frozen):
    """DeepSpeed's ZeRO (arXiv 1910.02054)."""

    later: ClassVar = ("offload_parameters", "gather_blocks", "weights")

    stage: Literal[0, 1, 2, 3] = Field(
        2, description="ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 weights too, 0 nothing"
    )
    offload_optimizer: bool = Field(False, description="optimizer states and gradients kept in main memory")
    offload_parameters: bool = Field(
        False, description="weights kept in main memory, except those in use; needs stage 3 and offload_optimizer"
    )
    weights: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="dtype of weights in computing and gathering, and of gradients in sending; bf16 keeps fp32 masters "
        "beside them, and needs stage 1, 2 or 3. fp32 by default, since bf16 has not run on a GPU yet",
    )
    gather_blocks: bool = Field(
        False,
        description="weights of each transformer block of the denoiser gathered by one collective, not layer by layer; "
        "needs stage 3. Off by default, since it has not run on a GPU yet",
    )


class ClusterConfig(Frozen):
    """The Ray cluster, and the share of it that one subject takes."""

    address: Place | None = Field(None, description="Ray cluster to join, 'auto' or an address; null: start one here")
    num_workers: Count = Field(1, description="workers that train one subject together")
    min_workers: Count | None = Field(
        None,
        description="fewest workers to train with while the cluster is short of room; null: all or none",
    )
    resize_seconds: Number = Field(
        60.0, gt=0, le=86_400, description="seconds between checks for room to grow, with min_workers"
    )
    use_gpu: bool | Literal["auto"] = Field("auto", description="one GPU per worker; auto: where the cluster has any")
    cpus_per_worker: Count = Field(1, description="CPUs reserved per worker; without a GPU, its threads too")
    max_failures: Retries = Field(2, description="restarts of a worker group after failures")
    lanes: Count | None = Field(
        None, description="worker groups of a batch that train subjects side by side; null: as many as fit"
    )
    lanes_per_gpu: Count | Literal["auto"] = Field(
        "auto",
        description="lanes that share a GPU, where one worker trains a subject; auto: one, unless earlier batches on "
        "such GPUs made more steps per second with several",
    )
    graph_sampling: Graph = Field(
        "off",
        description="auto: on a GPU the steps of samplers are captured as CUDA graphs, once for each shape of a batch, "
        "and a worker keeps their memory. A step that can't be captured runs as with off, and the worker's log gives "
        "the reason. Off by default, since it has not run on a GPU yet",
    )
    subject_retries: Retries = Field(1, description="retries of a failed subject of a batch before it is set aside")


class StorageConfig(Frozen):
    """Where results go: a local path or any address that fsspec knows."""

    root: OpenPlace = Field(
        "output", description="folder of all results; any fsspec address, such as s3://bucket/results"
    )
    run: OpenPlace | None = Field(None, description="folder of this run; null: <root>/<subject name>")
    prior: OpenPlace | None = Field(None, description="folder of the shared class-image sets; null: <root>/prior")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float16", description="dtype of the published weights")


class TrackingConfig(Frozen):
    """Tracking with MLflow."""

    uri: Place | None = Field(None, description="tracking address; null: sqlite:///mlflow.db in the working folder")
    experiment: ExperimentName = Field("dreambooth", description="MLflow experiment of runs and batches")
    register_model: bool = Field(True, description="registration of the published model; false: only publish it")
    registered_model_name: ModelName | None = Field(
        None, description="registered name; null: dreambooth-<subject name>"
    )


class RegistryConfig(Frozen):
    """Registered models."""

    storage: Literal["reference", "full", "delta"] = Field(
        "reference",
        description="content of a version: the address of the published model, which must stay readable, a copy of "
        "all weights, or their exact change (delta), which needs the base",
    )


class SuperResolutionConfig(Frozen):
    """The second stage of a cascade, fine-tuned after the first on the instance images alone."""

    base_model: Words | None = Field(
        None, description="model that upscales the base model's pictures, given like base_model; null: none"
    )
    revision: str | None = Field(None, description="revision of a hub id")
    resolution: Resolution | None = Field(None, description="side of its pictures in pixels; null: the model's own")
    max_train_steps: Whole = Field(1000, ge=0, le=MOST_STEPS, description="optimizer steps; 0: not fine-tuned")
    learning_rate: Rate = Field(1e-6, description="learning rate of the denoiser")
    noise_levels: NoiseLevels | None = Field(
        None,
        description="levels, from 0, of the small picture's noise in fine-tuning; samples use a quarter of them. null: "
        "the model's own",
    )


class DreamBoothConfig(Frozen):
    """One subject, end to end."""

    subject: Subject
    base_model: Words = Field(
        "miniature",
        description="'miniature', 'miniature-flow' or 'miniature-cascade' (built in), a diffusers directory at any "
        "address, a hub id, or a .safetensors file; '#' and a model after it name the source of its configurations, if "
        "its header doesn't determine it",
    )
    revision: str | None = Field(None, description="revision of a hub id")
    engine: Literal["auto", "torch", "deepspeed"] = Field(
        "auto",
        description="training engine; auto: DeepSpeed for several workers or offload, else PyTorch; PyTorch also for "
        "every train.optimizer but adamw",
    )
    prompts: PromptTemplates = PromptTemplates()
    images: ImagesConfig = ImagesConfig()
    prior: PriorConfig = PriorConfig()
    train: TrainConfig = TrainConfig()
    zero: ZeroConfig = ZeroConfig()
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    super_resolution: SuperResolutionConfig = SuperResolutionConfig()

    @model_validator(mode="after")
    def _warm_up_fits_the_second_stage(self) -> Self:
        own, warm_up = self.super_resolution, self.train.lr_warmup_steps
        if own.base_model is not None and warm_up >= own.max_train_steps > 0:
            raise ValueError(
                f"train.lr_warmup_steps is {warm_up}, and holds for both stages, but there are only "
                f"{own.max_train_steps} super_resolution.max_train_steps"
            )
        return self

    @model_validator(mode="after")
    def _scores_are_measured(self) -> Self:
        if self.train.by_score and self.evaluation.every is None:
            setting = "train.keep: best" if self.train.keep == "best" else "train.stop_after"
            raise ValueError(
                f"{setting} goes by scores of the training; set evaluation.every to the steps between them"
            )
        return self

    @model_validator(mode="after")
    def _fewer_workers_can_share(self) -> Self:
        fewest, most = self.cluster.min_workers, self.cluster.num_workers
        if fewest is None:
            return self
        if fewest > most:
            raise ValueError(f"cluster.min_workers is {fewest}, but cluster.num_workers only {most}")
        micro_steps = most * self.train.gradient_accumulation_steps
        for workers in range(fewest, most):
            if micro_steps % workers:
                raise ValueError(
                    f"cluster.min_workers: {workers} workers can't share the {micro_steps} micro steps of a step "
                    f"evenly; set train.gradient_accumulation_steps to a multiple of {workers}, or min_workers higher"
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _textual_inversion_stands_alone(cls, settings: Any) -> Any:
        """Require prompts with the identifier alone and no prior preservation for Textual Inversion."""
        if isinstance(settings, dict) and setting_of(settings, "train", "method") == "textual_inversion":
            if setting_of(settings, "prior", "prior_loss_weight") not in (None, 0):
                raise ValueError(
                    "prior.prior_loss_weight: prior preservation has no part in train.method textual_inversion; "
                    "leave it out, or set it to 0"
                )
            alone = {"prior": {"prior_loss_weight": 0.0}, "prompts": {"instance": "a photo of {identifier}"}}
            return merge(alone, settings)
        return settings

    @property
    def second_stage(self) -> "DreamBoothConfig | None":
        """The settings by which the second stage is fine-tuned, as if it were a base model; None without one.

        It has no class images: the paper fine-tunes its super-resolution on pairs of the subject alone (section 4), and
        what the first stage draws decides what is there to scale up. Scores are of both, unless it takes no steps.
        """
        own = self.super_resolution
        if own.base_model is None:
            return None
        steps = {"max_train_steps": own.max_train_steps, "learning_rate": own.learning_rate}
        alone = {"text_encoders": "none", "text_encoder_learning_rate": None, "identifier_learning_rate": None}
        scores: dict[str, dict[str, Any]] = {"train": {}, "evaluation": {}}
        if not own.max_train_steps:
            scores = {"train": {"keep": "last", "stop_after": None}, "evaluation": {"every": None}}
        return self.model_copy(
            update={
                "base_model": own.base_model,
                "revision": own.revision,
                "images": self.images.model_copy(update={"resolution": own.resolution}),
                "prior": self.prior.model_copy(update={"prior_loss_weight": 0.0}),
                "train": self.train.model_copy(update={**steps, **alone, **scores["train"], "validate_every": None}),
                "evaluation": self.evaluation.model_copy(update={**scores["evaluation"], "protocol": "none"}),
                "super_resolution": SuperResolutionConfig(noise_levels=own.noise_levels),
            }
        )

    @property
    def picture_side(self) -> int:
        """Side in pixels of the pictures that a planned run's model makes, by its last stage."""
        own = self.super_resolution
        return int((self.images.resolution if own.base_model is None else own.resolution) or 0)

    @property
    def run_uri(self) -> str:
        """Folder of this run."""
        return self.storage.run or f"{self.storage.root.rstrip('/')}/{self.subject.name}"

    @property
    def prior_uri(self) -> str:
        """Folder of the shared class-image sets."""
        return self.storage.prior or f"{self.storage.root.rstrip('/')}/prior"

    @property
    def model_name(self) -> str:
        """Name in the model registry."""
        return self.tracking.registered_model_name or f"dreambooth-{self.subject.name}"


def config_hash(*parts: Frozen | dict[str, Any] | str) -> str:
    """First 16 hex digits of the sha256 of settings (`keyed`) in canonical JSON; equal settings give equal hashes."""
    plain = [part.keyed() if isinstance(part, Frozen) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def load_config(source: Path | dict[str, Any], overrides: tuple[str, ...] = ()) -> DreamBoothConfig:
    """Read a configuration from YAML (or a mapping) and dotted overrides such as `train.max_train_steps=400`.

    Raises InputError for a file that can't be read, an unknown setting (with the nearest known one) or a wrong value.
    """
    settings = read_yaml(source) if isinstance(source, Path) else source
    for override in overrides:
        settings = merge(settings, parse_override(override))
    settings = with_miniature_defaults(settings)
    if setting_of(settings, "train", "method") != "textual_inversion":  # which decides on other sections
        settings = read_sections(DreamBoothConfig, settings)
    try:
        return DreamBoothConfig.model_validate(settings)
    except ValidationError as error:
        raise InputError(explain(error, DreamBoothConfig)) from None
