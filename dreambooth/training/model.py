"""Denoiser and text encoders in one module, so that one engine trains and ZeRO shards all of them."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.data.batches import Batch
from dreambooth.data.identifier import token_ids_in_prompts
from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.families import Family, Tensors, family_of
from dreambooth.models.probe import Probe, Trained, encoded_text, probe_prompts
from dreambooth.models.process import Process
from dreambooth.models.stored_weights import SliceReader, StoredTensor
from dreambooth.quiet import hide_progress_bars
from dreambooth.training.identifier_embedding import IdentifierEmbedding
from dreambooth.training.losses import Losses, image_errors, prior_preservation_loss

DENOISER = "denoiser"


class DreamBoothModel(nn.Module):
    """All fine-tuned modules, and the loss.

    `text_encoders` by folder are run at every step; of others the input has what they gave. Parameters are named
    `denoiser.…` and by a text encoder's folder. `identifier_embeddings` by folder have their own learning rate. What
    the text encoders make of `probe_tokens` goes with an export (see `models.probe`). Parameters stay in fp32; with
    `autocast` matrix products run in bf16, so that an update of 5e-6 isn't rounded away as in bf16 weights; only an
    engine that keeps fp32 masters rounds them. Those that are `stored`, by name, are on the meta device until an engine
    reads its part of them.
    """

    def __init__(
        self,
        *,
        family: Family,
        denoiser: nn.Module,
        text_encoders: Mapping[str, nn.Module],
        process: Process,
        prior_loss_weight: float,
        identifier_embeddings: Mapping[str, IdentifierEmbedding] | None = None,
        min_snr_gamma: float | None = None,
        probe_tokens: Tensors | None = None,
        autocast: bool = False,
        stored: Mapping[str, StoredTensor] | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._folders = tuple(text_encoders)
        for folder, text_encoder in text_encoders.items():
            self.add_module(folder, text_encoder)
        self.identifier_embeddings = nn.ModuleDict(identifier_embeddings or {})
        self.family = family
        self.process = process
        self.prior_loss_weight = prior_loss_weight
        self.min_snr_gamma = min_snr_gamma
        self.probe_tokens = probe_tokens
        self.autocast = autocast
        self.stored = stored or {}

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """Text encoders that are run at every step, by folder."""
        return {folder: self.get_submodule(folder) for folder in self._folders}

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        text: Tensors,
        conditions: Tensors,
        mask: Tensor | None = None,
        class_half: Batch | None = None,
    ) -> Losses:
        """Losses of a `Batch`: both halves through one pass, or the class half through one of its own."""
        errors = self._errors(latents, noise, timesteps, text, conditions, mask)
        if class_half is not None:
            errors = torch.cat([errors, self._errors(*class_half[:-1])])
        return prior_preservation_loss(errors, prior_loss_weight=self.prior_loss_weight)

    def _errors(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        text: Tensors,
        conditions: Tensors,
        mask: Tensor | None,
    ) -> Tensor:
        """Weighted errors (N,) of images of one size."""
        noisy = self.process.noisy(latents, noise, timesteps)
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.autocast):
            encoded = self.family.encode_text(self.text_encoders, text)
            model_pred = self.family.denoise(self.denoiser, noisy, timesteps, encoded, conditions)
        return image_errors(
            model_pred,
            self.process.target(latents, noise, timesteps),
            weight=self.process.weight(timesteps, min_snr_gamma=self.min_snr_gamma),
            mask=mask,
        )

    def exported(self, state: Mapping[str, Tensor]) -> Trained:
        """The trained components, complete, from this module's parameters by name, fp32 on the CPU.

        Includes what the text encoders make of the probe's prompts, if any is run.
        """
        exported: dict[str, Tensor] = {}
        if any(parameter.requires_grad for parameter in self.denoiser.parameters()):
            exported |= {name: p for name, p in state.items() if name.startswith(f"{DENOISER}.")}
        encoded: Tensors = {}
        for folder, text_encoder in self.text_encoders.items():
            owner, embedding = f"{folder}.", None
            weights = {name.removeprefix(owner): p for name, p in state.items() if name.startswith(owner)}
            folded: Mapping[str, Tensor] = weights
            if folder in self.identifier_embeddings:
                identifier = self.identifier_embeddings[folder]
                assert isinstance(identifier, IdentifierEmbedding)
                embedding = identifier, state[f"identifier_embeddings.{folder}.change"]
                folded = identifier.folded(weights, embedding[1])
            exported |= {f"{owner}{name}": parameter for name, parameter in folded.items()}
            if self.probe_tokens is not None:
                encoded |= encoded_text(self.family, folder, text_encoder, weights, self.probe_tokens, embedding)
        trained = Trained(exported)
        if self.probe_tokens is not None and encoded:
            trained.probe = Probe(tokens=self.probe_tokens, encoded=encoded)
        return trained


@dataclass(frozen=True, kw_only=True)
class Components:
    """Trainable components of a base model; text encoders by folder, in order.

    `stored` has the place of each parameter that isn't loaded, by its name in a `DreamBoothModel`; None if all are.
    """

    family: Family
    directory: Path
    denoiser: nn.Module
    text_encoders: Mapping[str, nn.Module]
    stored: Mapping[str, StoredTensor] | None = None

    def copied(self) -> Self:
        """A copy that can be trained while these stay unchanged."""
        return replace(
            self, denoiser=copy.deepcopy(self.denoiser), text_encoders=copy.deepcopy(dict(self.text_encoders))
        )


def load_components(directory: Path, text_encoders: Sequence[str] | None = None, *, whole: bool = True) -> Components:
    """Load the denoiser and text encoders from a diffusers directory, in fp32.

    `text_encoders` are folders; None: those that its family trains by default. Unless `whole`, parameters stay in their
    files, for ranks of ZeRO-3 to read a part each.
    """
    hide_progress_bars()
    family = family_of(directory)
    wanted = family.defaults.text_encoders if text_encoders is None else text_encoders
    folders = {DENOISER: family.denoiser.folder}
    folders |= {part.folder: part.folder for part in family.text_encoders(directory) if part.folder in wanted}
    modules: dict[str, nn.Module] = {}
    stored: dict[str, StoredTensor] = {}
    for owner, folder in folders.items():
        if whole:
            modules[owner] = family.load(directory, folder)
            continue
        modules[owner], own = family.stored(directory, folder)
        stored |= {f"{owner}.{name}": one for name, one in own.items()}
    return Components(
        family=family,
        directory=directory,
        denoiser=modules.pop(DENOISER),
        text_encoders=modules,
        stored=None if whole else stored,
    )


def build_model(components: Components, config: DreamBoothConfig, *, autocast: bool = False) -> DreamBoothModel:
    """The model of one run, which trains `components` in place: the denoiser, and text encoders that aren't frozen.

    Textual Inversion (arXiv 2208.01618) trains the identifier's embedding alone, which starts as the class noun's.
    """
    family, directory = components.family, components.directory
    embedding_only = config.train.method == "textual_inversion"
    run = family.run_text_encoders(directory, config.train)
    text_encoders = {folder: module for folder, module in components.text_encoders.items() if folder in run}
    embeddings = {
        folder: _identifier_embedding(components, folder, module, config)
        for folder, module in text_encoders.items()
        if config.train.learns_identifier_apart
    }
    if config.train.gradient_checkpointing:
        components.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        for text_encoder in text_encoders.values():
            text_encoder.activation_checkpointing_enable()  # type: ignore[operator]
    prompts = probe_prompts(config.subject, config.prompts)
    settings = BaseSettings(directory)
    shape = settings.x0_shape(config.images.resolution or settings.resolution)
    model = DreamBoothModel(
        family=family,
        denoiser=components.denoiser,
        text_encoders=text_encoders,
        process=family.process(directory, shape),
        prior_loss_weight=config.prior.prior_loss_weight,
        identifier_embeddings=embeddings,
        probe_tokens=family.tokenize(directory, prompts) if text_encoders else None,
        min_snr_gamma=config.train.min_snr_gamma,
        autocast=autocast,
        stored=components.stored,
    )
    model.train().requires_grad_(not embedding_only)
    model.identifier_embeddings.requires_grad_(True)
    family.freeze(directory, model.denoiser, model.text_encoders)
    return model


def _identifier_embedding(
    components: Components, folder: str, text_encoder: nn.Module, config: DreamBoothConfig
) -> IdentifierEmbedding:
    """The embedding of the identifier's tokens, which starts as their own, or as the class noun's."""
    tokenizer = components.family.tokenizer(components.directory, folder.replace("text_encoder", "tokenizer"))
    token_ids = token_ids_in_prompts(tokenizer, str(config.subject.identifier))
    like = None
    if config.train.method == "textual_inversion":
        # Of a class noun of several words the last says what the thing is: "stuffed animal", "fire engine".
        like = token_ids_in_prompts(tokenizer, config.subject.class_noun)[-1]
    stored = components.stored or {}

    def row(table: str, token_id: int) -> Tensor:
        return SliceReader().row(stored[f"{folder}.{table}"], token_id)

    return IdentifierEmbedding(text_encoder, token_ids, like=like, row=row)


def load_model(
    directory: Path, config: DreamBoothConfig, *, autocast: bool = False, whole: bool = True
) -> DreamBoothModel:
    """Load the model of a run from a diffusers directory; for `whole` see `load_components`."""
    run = family_of(directory).run_text_encoders(directory, config.train)
    return build_model(load_components(directory, run, whole=whole), config, autocast=autocast)
