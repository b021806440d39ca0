"""Settings of training: method, length, learning rates, batch, and exported weights."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from dreambooth.config.bounds import (
    Count,
    Decay,
    Fraction,
    Gamma,
    GradNorm,
    Graph,
    Minutes,
    Number,
    Rate,
    Seed,
    Share,
    Steps,
    Whole,
)
from dreambooth.config.limits import MOST_STEPS
from dreambooth.config.subject import Frozen, Words

TEXTUAL_INVERSION_RATE = 5e-3
"""The base learning rate of Textual Inversion (arXiv 2208.01618, section 4)."""

RATES_OF_TEXT_ENCODER = ("text_encoder_learning_rate", "identifier_learning_rate")
"""Settings of TrainConfig without effect on a frozen text encoder."""

SETTINGS_OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
"""Settings of TrainConfig without effect on Adafactor."""


def _named(value: Any) -> Any:
    """A list of folders, or one of three words."""
    if isinstance(value, str) and value not in ("auto", "all", "none"):
        raise ValueError(f"expected auto, all, none or a list of folders such as [text_encoder_2], got {value!r}")
    return value


TextEncoders = Annotated[Literal["auto", "all", "none"] | tuple[Words, ...], BeforeValidator(_named)]


class TrainConfig(Frozen):
    """Fine-tuning of denoiser and text encoder, or of the identifier's embedding alone."""

    later: ClassVar = ("optimizer", "caption_dropout", "keep_unaveraged")

    max_train_steps: Steps = Field(1000, description="optimizer steps")
    method: Literal["dreambooth", "textual_inversion"] = Field(
        "dreambooth",
        description="training method; textual_inversion trains the identifier's embedding alone (arXiv 2208.01618)",
    )
    micro_batch_size: Count = Field(1, description="instance/class pairs per worker and micro step")
    gradient_accumulation_steps: Count = Field(1, description="micro steps per optimizer step")
    text_encoders: TextEncoders = Field(
        "auto",
        description="text encoders to train: all, none, or their folders, such as [text_encoder_2]; auto: by the base "
        "model's family. Frozen ones encode the prompts once",
    )
    learning_rate: Rate = Field(5e-6, description="learning rate of the denoiser")
    text_encoder_learning_rate: Rate | None = Field(
        None, description="learning rate of the text encoder; null: learning_rate"
    )
    identifier_learning_rate: Rate | None = Field(
        None,
        description="learning rate of the identifier's embedding; null: text encoder's, or 5e-3 with textual_inversion",
    )
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning-rate schedule after the warm-up; linear and cosine end at 0"
    )
    lr_warmup_steps: Whole = Field(0, ge=0, le=MOST_STEPS, description="steps over which learning rates rise from 0")
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = Field(
        "adamw",
        description="optimizer; adamw8bit keeps AdamW's moments in 8 bits (arXiv 2110.02861, by torchao), adafactor "
        "only second moments, factored by rows and columns (arXiv 1804.04235, by transformers)",
    )
    adam_beta1: Decay = Field(0.9, description="AdamW's decay of the first moment")
    adam_beta2: Decay = Field(0.999, description="AdamW's decay of the second moment")
    adam_epsilon: Rate = Field(1e-8, description="AdamW's epsilon")
    weight_decay: Number = Field(
        1e-2, ge=0, le=100, description="the optimizer's weight decay; the identifier's embedding has none"
    )
    max_grad_norm: GradNorm | None = Field(
        1.0, description="largest gradient norm; larger gradients are scaled down to it; null: not scaled"
    )
    fused_backward: bool = Field(
        False,
        description="parameters updated within the backward pass, each gradient freed at once: less memory. Needs one "
        "worker, no accumulation and no max_grad_norm",
    )
    graph: Graph = Field(
        "off",
        description="auto: with engine torch, one worker, adamw and a GPU the step is captured as CUDA graphs, once "
        "for all subjects of a base model with equal settings, and a lane keeps its memory between them. A step that "
        "can't be captured runs as with off, and the worker's log gives the reason. Off by default, since it has not "
        "run on a GPU yet",
    )
    mixed_precision: Literal["auto", "bf16", "no"] = Field(
        "auto",
        description="precision of matrix products; auto: bf16 on GPUs, unless a GPU of the cluster is known to lack it",
    )
    gradient_checkpointing: bool = Field(
        False, description="activations recomputed in the backward pass: less memory, more time"
    )
    ema_decay: Fraction | None = Field(
        None, description="decay of the weights' moving average, which is then exported; null: no average"
    )
    keep_unaveraged: bool = Field(
        False,
        description="with ema_decay, also publish the last step's weights, as their change against the base model, for "
        "'dreambooth export --no-ema'",
    )
    min_snr_gamma: Gamma | None = Field(
        None, description="gamma of min-SNR weighting (arXiv 2303.09556); 5 is usual, null: unweighted"
    )
    noise_offset: Number = Field(0.0, ge=0, le=10, description="standard deviation of a per-channel shift of the noise")
    caption_dropout: Share = Field(
        0.0,
        description="share of pairs trained on the empty prompt, both halves, for classifier-free guidance; 0.1 is "
        "usual",
    )
    seed: Seed = Field(0, description="seed of crops, noise, timesteps and order")
    log_every: Steps = Field(1, description="steps between points of the logged curves")
    checkpoint_every: Steps = Field(
        200,
        description="steps between checkpoints, which are written while training continues; a fault costs the steps "
        "since the last complete one",
    )
    checkpoint_every_minutes: Minutes | None = Field(
        None, description="most minutes between the starts of two checkpoints; null: by steps alone"
    )
    validate_every: Steps | None = Field(None, description="steps between validation samples; null: only at the end")
    keep: Literal["last", "best"] = Field(
        "last", description="weights to export; best: those with the highest score (evaluation.every)"
    )
    stop_after: Steps | None = Field(
        None, description="scores in a row without a new best before training ends early; null: never"
    )

    @model_validator(mode="before")
    @classmethod
    def _known_by_its_former_name(cls, settings: Any) -> Any:
        """Read train_text_encoder: true is auto, false is none."""
        if not isinstance(settings, dict) or "train_text_encoder" not in settings:
            return settings
        if "text_encoders" in settings:
            raise ValueError("train_text_encoder and text_encoders set the same; leave train_text_encoder out")
        rest = {name: value for name, value in settings.items() if name != "train_text_encoder"}
        trained = TypeAdapter(bool).validate_python(settings["train_text_encoder"])
        return rest | {"text_encoders": "auto" if trained else "none"}

    @model_validator(mode="after")
    def _warm_up_fits(self) -> Self:
        if self.lr_warmup_steps >= self.max_train_steps and self.lr_warmup_steps > 0:
            raise ValueError(
                f"lr_warmup_steps is {self.lr_warmup_steps}, but there are only {self.max_train_steps} max_train_steps"
            )
        return self

    @model_validator(mode="after")
    def _average_leaves_something_to_keep(self) -> Self:
        if self.keep_unaveraged and self.ema_decay is None:
            raise ValueError(
                "keep_unaveraged keeps what the moving average replaces, but ema_decay is null: the published weights "
                "are the last step's; set ema_decay, or leave keep_unaveraged out"
            )
        return self

    @model_validator(mode="after")
    def _text_is_what_is_learnt(self) -> Self:
        if self.method == "textual_inversion" and self.caption_dropout:
            raise ValueError(
                f"caption_dropout is {self.caption_dropout}, but method textual_inversion trains the identifier alone, "
                f"and nothing without it in a prompt; leave caption_dropout out"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_has_its_settings(self) -> Self:
        """Refuse settings of Adam for an optimizer that has none of them: they would be silently ignored."""
        for name in SETTINGS_OF_ADAM if self.optimizer == "adafactor" else ():
            if (value := getattr(self, name)) != (default := type(self).model_fields[name].default):
                raise ValueError(
                    f"{name} is {value}, but optimizer adafactor has no such setting; leave it at {default}, "
                    f"or take optimizer adamw or adamw8bit"
                )
        return self

    @model_validator(mode="after")
    def _gradients_can_be_freed(self) -> Self:
        """Refuse what needs all gradients at once where each is freed within the backward pass."""
        if not self.fused_backward:
            return self
        if self.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm is {self.max_grad_norm}, but with fused_backward the norm of all gradients is known "
                f"only after the update; set max_grad_norm to null, or leave fused_backward out"
            )
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, but with fused_backward every "
                f"backward pass is an update; set it to 1, with a larger micro_batch_size, or leave fused_backward out"
            )
        return self

    @model_validator(mode="after")
    def _rates_are_used(self) -> Self:
        """Refuse a learning rate for a part that isn't trained: it would be silently ignored."""
        if self.trains_text_encoder or self.method == "textual_inversion":
            return self
        for name in RATES_OF_TEXT_ENCODER:
            if (rate := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name} is {rate}, but text_encoders is none, and what it is for is part of a text encoder; "
                    f"leave one of them out"
                )
        return self

    @property
    def by_score(self) -> bool:
        """Whether the exported weights depend on scores during training."""
        return self.keep == "best" or self.stop_after is not None

    @property
    def learning_rates(self) -> tuple[float, float]:
        """Learning rates of (denoiser, text encoder)."""
        text_encoder = self.text_encoder_learning_rate
        return self.learning_rate, self.learning_rate if text_encoder is None else text_encoder

    @property
    def embedding_learning_rate(self) -> float:
        """Learning rate of the identifier's embedding if it has its own."""
        rate = self.identifier_learning_rate
        return TEXTUAL_INVERSION_RATE if rate is None else rate

    @property
    def learns_identifier_apart(self) -> bool:
        """Whether the identifier's embedding has a learning rate of its own."""
        embedding_only = self.method == "textual_inversion"
        return embedding_only or (self.trains_text_encoder and self.identifier_learning_rate is not None)

    @property
    def trains_text_encoder(self) -> bool:
        """Whether any text encoder is trained."""
        return self.text_encoders not in ("none", ())
