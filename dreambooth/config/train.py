"""What a training is told: the method, its length, rates and batch, and what is kept of it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dreambooth.config.bounds import Count, Decay, Fraction, Gamma, Number, Rate, Seed, Steps, Whole
from dreambooth.config.limits import MOST_STEPS
from dreambooth.config.subject import Frozen

TEXTUAL_INVERSION_RATE = 5e-3
"""The base learning rate of Textual Inversion (arXiv 2208.01618, section 4)."""

RATES_OF_TEXT_ENCODER = ("text_encoder_learning_rate", "identifier_learning_rate")
"""Settings of TrainConfig that a frozen text encoder has no use for."""


class TrainConfig(Frozen):
    """The fine-tuning of denoiser and text encoder, or of the identifier's embedding alone."""

    max_train_steps: Steps = Field(1000, description="optimizer steps")
    method: Literal["dreambooth", "textual_inversion"] = Field(
        "dreambooth",
        description="textual_inversion trains the identifier's embedding and nothing else (arXiv 2208.01618)",
    )
    micro_batch_size: Count = Field(1, description="instance/class pairs per worker and micro step")
    gradient_accumulation_steps: Count = Field(1, description="micro steps per optimizer step")
    train_text_encoder: bool = Field(True, description="false: it stays frozen and prompts are encoded once")
    learning_rate: Rate = Field(5e-6, description="of the denoiser")
    text_encoder_learning_rate: Rate | None = Field(None, description="None: the same as learning_rate")
    identifier_learning_rate: Rate | None = Field(
        None,
        description="of the identifier's own token embedding; None: the text encoder's, or with textual_inversion 5e-3",
    )
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how the rates go on after the warm-up; linear and cosine end at 0"
    )
    lr_warmup_steps: Whole = Field(0, ge=0, le=MOST_STEPS, description="steps in which the rates rise from 0")
    adam_beta1: Decay = Field(0.9, description="AdamW's decay of the first moment")
    adam_beta2: Decay = Field(0.999, description="AdamW's decay of the second moment")
    adam_epsilon: Rate = Field(1e-8, description="AdamW's epsilon")
    weight_decay: Number = Field(1e-2, ge=0, le=100, description="AdamW's; never of the identifier's embedding")
    max_grad_norm: Number = Field(1.0, gt=0, le=1e9, description="the gradient is scaled down to this norm")
    mixed_precision: Literal["auto", "bf16", "no"] = Field("auto", description="auto: bf16 on GPUs that have it")
    gradient_checkpointing: bool = Field(False, description="activations are computed again: less memory, more time")
    ema_decay: Fraction | None = Field(None, description="None: no moving average; else it is what is exported")
    min_snr_gamma: Gamma | None = Field(None, description="min-SNR weighting (arXiv 2303.09556); 5 is usual")
    noise_offset: Number = Field(0.0, ge=0, le=10, description="standard deviation of a per-channel shift of the noise")
    seed: Seed = Field(0, description="of crops, noise, timesteps and order")
    log_every: Steps = Field(1, description="steps between points of the curves")
    checkpoint_every: Steps = Field(200, description="steps between checkpoints: what a fault costs at most")
    validate_every: Steps | None = Field(None, description="steps between validation samples; None: only at the end")
    keep: Literal["last", "best"] = Field(
        "last", description="which weights are exported; best: those of the highest score (evaluation.every)"
    )
    stop_after: Steps | None = Field(
        None, description="end early after as many measurements in a row without a higher score; None: never"
    )

    @model_validator(mode="after")
    def _warm_up_fits(self) -> Self:
        if self.lr_warmup_steps >= self.max_train_steps and self.lr_warmup_steps > 0:
            raise ValueError(
                f"lr_warmup_steps is {self.lr_warmup_steps}, but there are only {self.max_train_steps} max_train_steps"
            )
        return self

    @model_validator(mode="after")
    def _rates_are_used(self) -> Self:
        """A rate of what isn't trained would change nothing, without a word."""
        if self.train_text_encoder or self.method == "textual_inversion":
            return self
        for name in RATES_OF_TEXT_ENCODER:
            if (rate := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name} is {rate}, but train_text_encoder is false, and what it is for is part of the text "
                    f"encoder; leave one of them out"
                )
        return self

    @property
    def by_score(self) -> bool:
        """Whether what is exported depends on scores measured on the way."""
        return self.keep == "best" or self.stop_after is not None

    @property
    def learning_rates(self) -> tuple[float, float]:
        """Learning rates of (denoiser, text encoder)."""
        text_encoder = self.text_encoder_learning_rate
        return self.learning_rate, self.learning_rate if text_encoder is None else text_encoder

    @property
    def embedding_learning_rate(self) -> float:
        """Learning rate of the identifier's embedding where it is learnt apart."""
        rate = self.identifier_learning_rate
        return TEXTUAL_INVERSION_RATE if rate is None else rate

    @property
    def learns_identifier_apart(self) -> bool:
        """Whether the identifier's embedding has a learning rate of its own."""
        embedding_only = self.method == "textual_inversion"
        return embedding_only or (self.train_text_encoder and self.identifier_learning_rate is not None)

    @property
    def runs_text_encoder(self) -> bool:
        """Whether every step runs the text encoder; else prompts are encoded once."""
        return self.train_text_encoder or self.method == "textual_inversion"
