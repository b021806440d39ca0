"""The key of a run's result: the hash of everything that decides the published weights."""

from typing import Any

from dreambooth.config.images import ImagesConfig
from dreambooth.config.settings import DreamBoothConfig, ZeroConfig, config_hash
from dreambooth.config.train import TrainConfig
from dreambooth.data.identifier import token_ids_in_prompts
from dreambooth.models.base_model import BaseModel
from dreambooth.sampling.class_images import PriorPlan
from pipelines.stages.evaluation_task import bank_address


def identifier_tokens(config: DreamBoothConfig, base: BaseModel) -> tuple[int, ...]:
    """Tokens of the identifier within a prompt."""
    return token_ids_in_prompts(base.tokenizer, str(config.subject.identifier))


def result_key(
    config: DreamBoothConfig, base: BaseModel, images_hash: str, prior: PriorPlan | None, engine: str, *, use_gpu: bool
) -> str:
    """Key of everything that decides the published weights and the layout of checkpoints."""
    place = f"{engine} on {'cuda' if use_gpu else 'cpu'} {_zero(config.zero) if engine == 'deepspeed' else ''}"
    train = config.train
    if train.mixed_precision == ("bf16" if use_gpu else "no"):
        train = train.model_copy(update={"mixed_precision": "auto"})  # what that is nearly everywhere
    prompts = [config.prompts.instance_prompt(config.subject), str(config.subject.identifier)]
    if train.method == "textual_inversion":
        prompts.append(config.subject.class_noun)  # initial embedding of the identifier
    tokens = identifier_tokens(config, base) if train.learns_identifier_apart else ()
    if len(set(tokens)) < len(tokens):
        prompts.append("each token once")  # earlier models without this key lack part of the trained weights
    parts: list[Any] = [
        base.hash,
        images_hash,
        *prompts,
        _images_part(config.images),
        _train_part(train, base),
        config.storage.dtype,
        place,
    ]
    parts += [str(config.cluster.num_workers)]
    if train.trains_text_encoder and train.method == "dreambooth":
        # Earlier results trained these, and keep keys without them.
        folders = base.run_text_encoders(train)
        parts += [f"{folder}.{name} kept" for folder in folders for name in base.family.kept(base.directory, folder)]
    if base.family.scales_up and (levels := config.super_resolution.noise_levels) is not None:
        parts.append(f"noise levels {levels}")
    parts += [prior.recipe, str(prior.count), str(config.prior.prior_loss_weight)] if prior else ["no prior"]
    if train.by_score:
        # The scores' images and encoders decide which weights are exported.
        evaluation = config.evaluation
        parts += [bank_address(evaluation, config.base_model).hash, str(evaluation.every)]
        parts += [str(evaluation.score_images), str(evaluation.num_inference_steps), str(evaluation.guidance_scale)]
        parts += [str(evaluation.seed), *evaluation.prompts_of(config.subject, config.prompts)]
    return config_hash(*parts)


def _images_part(images: ImagesConfig) -> dict[str, Any]:
    """Settings of images that decide the weights."""
    crops = images.crops_per_image if images.crop == "random" else 1
    repeats = {name: times for name, times in images.repeats.items() if times > 1}
    parts = images.model_copy(update={"max_pixels": 1, "crops_per_image": crops, "repeats": repeats}).keyed()
    if not images.aspect_buckets:
        del parts["bucket_step"], parts["bucket_max_aspect_ratio"]
    if images.masks != "weight":
        del parts["mask_background"]
    return parts


def _zero(zero: ZeroConfig) -> str:
    """Settings of ZeRO."""
    return " ".join(f"{name}={value}" for name, value in zero.keyed().items())


def _train_part(train: TrainConfig, base: BaseModel) -> dict[str, Any]:
    """Settings of training that decide the weights, in one spelling for each meaning."""
    parts = train.model_copy(update={"log_every": 1, "checkpoint_every": 1, "validate_every": None}).keyed()
    run = base.run_text_encoders(train)
    del parts["text_encoders"]
    del parts["fused_backward"], parts["graph"], parts["checkpoint_every_minutes"]  # which give the same weights
    parts["train_text_encoder"] = train.trains_text_encoder
    if len(base.family.role("text_encoder")) > 1:
        parts["text_encoders"] = run
    return parts
