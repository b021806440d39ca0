"""Denoiser and text encoder in one module, so that one engine trains and ZeRO shards both."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.data.identifier import token_ids_in_prompts
from dreambooth.models.families import Family, family_of
from dreambooth.models.families.stable_diffusion import load_tokenizer
from dreambooth.models.probe import Probe, Trained, hidden_states, probe_prompts
from dreambooth.quiet import hide_progress_bars
from dreambooth.training.identifier_embedding import IdentifierEmbedding
from dreambooth.training.losses import Losses, NoiseSchedule, prior_preservation_loss


class DreamBoothModel(nn.Module):
    """All fine-tuned modules, and the loss.

    With `text_encoder` None the input is text embeddings instead of token ids. `identifier_token_ids` have their own
    learning rate (see `IdentifierEmbedding`) and start at the embedding of the token `embedding_like`, if given. Hidden
    states of the prompts `probe_ids` (N, L) go with an export (see `models.probe`). Parameters stay in fp32; with
    `autocast` matrix products run in bf16, so that an update of 5e-6 isn't rounded away as in bf16 weights.
    """

    def __init__(
        self,
        *,
        family: Family,
        denoiser: nn.Module,
        text_encoder: nn.Module | None,
        schedule: NoiseSchedule,
        prior_loss_weight: float,
        identifier_token_ids: Sequence[int] = (),
        embedding_like: int | None = None,
        min_snr_gamma: float | None = None,
        probe_ids: Tensor | None = None,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.text_encoder = text_encoder
        self.identifier_embedding = (
            IdentifierEmbedding(text_encoder, identifier_token_ids, like=embedding_like)
            if text_encoder and identifier_token_ids
            else None
        )
        self.family = family
        self.schedule = schedule
        self.prior_loss_weight = prior_loss_weight
        self.min_snr_gamma = min_snr_gamma
        self.probe_ids = probe_ids
        self.autocast = autocast

    def forward(self, latents: Tensor, noise: Tensor, timesteps: Tensor, text: Tensor) -> Losses:
        """Losses of a `Batch`: instance half first, class half second, both through one pass."""
        noisy_latents = self.schedule.noisy_latents(latents, noise, timesteps)
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.autocast):
            encoder_hidden_states = (
                text if self.text_encoder is None else self.family.encode_text(self.text_encoder, text)
            )
            model_pred = self.family.denoise(self.denoiser, noisy_latents, timesteps, encoder_hidden_states)
        weight = None if self.min_snr_gamma is None else self.schedule.min_snr_weight(timesteps, self.min_snr_gamma)
        return prior_preservation_loss(
            model_pred,
            self.schedule.target(latents, noise, timesteps),
            prior_loss_weight=self.prior_loss_weight,
            weight=weight,
        )

    def exported(self, state: Mapping[str, Tensor]) -> Trained:
        """The trained components, complete, from this module's parameters by name, fp32 on the CPU.

        Includes the text encoder's hidden states of the probe's prompts, if it is run.
        """
        if self.text_encoder is None:
            return Trained(state)
        owner, embedding = "text_encoder.", None
        text_encoder = {name.removeprefix(owner): p for name, p in state.items() if name.startswith(owner)}
        exported, denoiser = text_encoder, {n: p for n, p in state.items() if n.startswith("denoiser.")}
        if self.identifier_embedding is not None:
            embedding = self.identifier_embedding, state["identifier_embedding.change"]
            exported = self.identifier_embedding.folded(text_encoder, embedding[1])
            if not any(parameter.requires_grad for parameter in self.denoiser.parameters()):
                denoiser = {}
        trained = Trained(denoiser | {f"{owner}{name}": parameter for name, parameter in exported.items()})
        if self.probe_ids is not None:
            states = hidden_states(self.family, self.text_encoder, text_encoder, self.probe_ids, embedding)
            trained.probe = Probe(input_ids=self.probe_ids, hidden_states=states)
        return trained


def load_schedule(directory: Path) -> NoiseSchedule:
    """The noise schedule of a base model."""
    scheduler = DDPMScheduler.from_pretrained(directory, subfolder="scheduler", local_files_only=True)
    return NoiseSchedule.from_scheduler(scheduler.alphas_cumprod, scheduler.config)


@dataclass(frozen=True, kw_only=True)
class Components:
    """Trainable components of a base model."""

    family: Family
    directory: Path
    denoiser: nn.Module
    text_encoder: nn.Module
    schedule: NoiseSchedule

    def copied(self) -> Self:
        """A copy that can be trained while these stay unchanged."""
        return replace(self, denoiser=copy.deepcopy(self.denoiser), text_encoder=copy.deepcopy(self.text_encoder))


def load_components(directory: Path) -> Components:
    """Load denoiser and text encoder from a diffusers directory, in fp32."""
    hide_progress_bars()
    family = family_of(directory)
    return Components(
        family=family,
        directory=directory,
        denoiser=family.load_denoiser(directory),
        text_encoder=family.load_text_encoder(directory),
        schedule=load_schedule(directory),
    )


def build_model(components: Components, config: DreamBoothConfig, *, autocast: bool = False) -> DreamBoothModel:
    """The model of one run, which trains `components` in place: the denoiser, and the text encoder unless frozen.

    Textual Inversion (arXiv 2208.01618) trains the identifier's embedding alone, which starts as the class noun's.
    """
    embedding_only = config.train.method == "textual_inversion"
    denoiser = components.denoiser
    text_encoder = components.text_encoder if config.train.runs_text_encoder else None
    token_ids, embedding_like = _identifier_tokens(components.directory, config)
    if config.train.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        if text_encoder is not None:
            text_encoder.activation_checkpointing_enable()  # type: ignore[operator]
    model = DreamBoothModel(
        family=components.family,
        denoiser=denoiser,
        text_encoder=text_encoder,
        schedule=components.schedule,
        prior_loss_weight=config.prior.prior_loss_weight,
        identifier_token_ids=token_ids,
        embedding_like=embedding_like,
        probe_ids=components.family.tokenize(components.directory, probe_prompts(config.subject, config.prompts))
        if text_encoder is not None
        else None,
        min_snr_gamma=config.train.min_snr_gamma,
        autocast=autocast,
    )
    model.train().requires_grad_(not embedding_only)
    if model.identifier_embedding is not None:
        model.identifier_embedding.requires_grad_(True)
    return model


def _identifier_tokens(directory: Path, config: DreamBoothConfig) -> tuple[Sequence[int], int | None]:
    """Tokens with a learning rate of their own, and the token whose embedding they start from (None: their own)."""
    if not config.train.learns_identifier_apart:
        return (), None
    tokenizer = load_tokenizer(directory)
    token_ids = token_ids_in_prompts(tokenizer, str(config.subject.identifier))
    if config.train.method != "textual_inversion":
        return token_ids, None
    # Of a class noun of several words the last says what the thing is: "stuffed animal", "fire engine".
    return token_ids, token_ids_in_prompts(tokenizer, config.subject.class_noun)[-1]


def load_model(directory: Path, config: DreamBoothConfig, *, autocast: bool = False) -> DreamBoothModel:
    """Load the model of a run from a diffusers directory."""
    return build_model(load_components(directory), config, autocast=autocast)
