"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer of rectified flow, two CLIP text encoders and T5."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dreambooth.errors import InputError
from dreambooth.models.component import (
    VAE,
    Component,
    denoiser_part,
    scheduler_part,
    text_encoder_part,
    tokenizer_part,
)
from dreambooth.models.config_fields import COUNT, NUMBER, flag, or_null, positive, read_json, whole
from dreambooth.models.families import original_names as original
from dreambooth.models.families.clip_text import encode_with_clip
from dreambooth.models.families.defaults import Defaults
from dreambooth.models.families.family import Family, Tensors
from dreambooth.models.families.schedulers import flow_scheduler
from dreambooth.models.families.sdxl import clip_prompt_arguments
from dreambooth.models.families.stable_diffusion import TEXT_FIELDS, VAE_FIELDS, field
from dreambooth.models.families.t5_text import t5_part
from dreambooth.models.families.tokenizers import load_tokenizer, padded_ids, read_tokenizer
from dreambooth.models.placed import Names, Placed
from dreambooth.models.weight_files import has_weights, is_identity

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from dreambooth.models.base_settings import BaseSettings
    from dreambooth.models.process import Process

_TRANSFORMER, _SCHEDULER = "transformer/config.json", "scheduler/scheduler_config.json"
_T5, _T5_TOKENS = "text_encoder_3", 256
_PROJECTION = "text_projection.weight"
_BLOCK = r"transformer_blocks\.(\d+)\."
_SINGLE_FILE = (
    (r"pos_embed\.pos_embed", "pos_embed"),
    (r"pos_embed\.proj\.(\w+)", r"x_embedder.proj.\1"),
    (r"context_embedder\.(\w+)", r"context_embedder.\1"),
    (r"proj_out\.(\w+)", r"final_layer.linear.\1"),
    (r"norm_out\.linear\.(\w+)", r"final_layer.adaLN_modulation.1.\1"),
    (r"time_text_embed\.timestep_embedder\.linear_1\.(\w+)", r"t_embedder.mlp.0.\1"),
    (r"time_text_embed\.timestep_embedder\.linear_2\.(\w+)", r"t_embedder.mlp.2.\1"),
    (r"time_text_embed\.text_embedder\.linear_1\.(\w+)", r"y_embedder.mlp.0.\1"),
    (r"time_text_embed\.text_embedder\.linear_2\.(\w+)", r"y_embedder.mlp.2.\1"),
    (_BLOCK + r"(attn2?)\.to_[qkv]\.(\w+)", r"joint_blocks.\1.x_block.\2.qkv.\3"),
    (_BLOCK + r"attn\.add_[qkv]_proj\.(\w+)", r"joint_blocks.\1.context_block.attn.qkv.\2"),
    (_BLOCK + r"(attn2?)\.norm_([qk])\.(\w+)", r"joint_blocks.\1.x_block.\2.ln_\3.\4"),
    (_BLOCK + r"attn\.norm_added_([qk])\.(\w+)", r"joint_blocks.\1.context_block.attn.ln_\2.\3"),
    (_BLOCK + r"(attn2?)\.to_out\.0\.(\w+)", r"joint_blocks.\1.x_block.\2.proj.\3"),
    (_BLOCK + r"attn\.to_add_out\.(\w+)", r"joint_blocks.\1.context_block.attn.proj.\2"),
    (_BLOCK + r"norm1\.linear\.(\w+)", r"joint_blocks.\1.x_block.adaLN_modulation.1.\2"),
    (_BLOCK + r"norm1_context\.linear\.(\w+)", r"joint_blocks.\1.context_block.adaLN_modulation.1.\2"),
    (_BLOCK + r"ff\.net\.0\.proj\.(\w+)", r"joint_blocks.\1.x_block.mlp.fc1.\2"),
    (_BLOCK + r"ff\.net\.2\.(\w+)", r"joint_blocks.\1.x_block.mlp.fc2.\2"),
    (_BLOCK + r"ff_context\.net\.0\.proj\.(\w+)", r"joint_blocks.\1.context_block.mlp.fc1.\2"),
    (_BLOCK + r"ff_context\.net\.2\.(\w+)", r"joint_blocks.\1.context_block.mlp.fc2.\2"),
)
"""Names of the transformer's tensors in a single file, as in the published SD3 and SD3.5."""


class StableDiffusion3(Family):
    """SD3Transformer2DModel on 16-channel latents; T5 is frozen by default, and may be missing."""

    name = "Stable Diffusion 3 and 3.5"
    pipeline_class = "StableDiffusion3Pipeline"
    components: tuple[Component, ...] = (
        denoiser_part("transformer", "SD3Transformer2DModel", buffers=("pos_embed.pos_embed",)),
        text_encoder_part("text_encoder", "CLIPTextModelWithProjection"),
        text_encoder_part("text_encoder_2", "CLIPTextModelWithProjection"),
        t5_part(_T5, optional=True),
        VAE,
        tokenizer_part("tokenizer", "CLIPTokenizer"),
        tokenizer_part("tokenizer_2", "CLIPTokenizer"),
        tokenizer_part("tokenizer_3", "T5TokenizerFast", optional=True),
        scheduler_part("FlowMatchEulerDiscreteScheduler"),
    )
    defaults = Defaults(text_encoders=("text_encoder", "text_encoder_2"), num_inference_steps=28, guidance_scale=7.0)
    fields = (
        field(_TRANSFORMER, "sample_size", 128, COUNT, whole),
        field(_TRANSFORMER, "patch_size", 2, COUNT, whole),
        field(_TRANSFORMER, "in_channels", 16, COUNT, whole),
        field(_TRANSFORMER, "pos_embed_max_size", 96, f"null or {COUNT}", or_null(whole)),
        *VAE_FIELDS,
        *TEXT_FIELDS,
        field(_SCHEDULER, "shift", 1.0, NUMBER, positive),
        field(_SCHEDULER, "use_dynamic_shifting", False, "false", lambda dynamic: flag(dynamic) and not dynamic),
    )
    noise = "rectified flow"
    lora_folders = ("transformer", "text_encoder", "text_encoder_2")
    embedding_names: ClassVar[Mapping[str, str]] = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    sampler = "FlowMatchEulerDiscreteScheduler"
    t5_tokens = _T5_TOKENS

    def side_multiple(self, settings: "BaseSettings") -> int:
        """Latents are cut into patches."""
        return self.downscaling(settings) * int(settings["transformer.patch_size"])

    def largest_side(self, settings: "BaseSettings") -> int | None:
        """Largest side by the transformer's table of positions, whose middle is read."""
        positions = settings["transformer.pos_embed_max_size"]
        return None if positions is None else int(positions) * self.side_multiple(settings)

    def channels(self, settings: "BaseSettings") -> int:
        """Channels of a latent."""
        return int(settings["transformer.in_channels"])

    def resolution(self, settings: "BaseSettings") -> int:
        """Pixels by the transformer's sample_size."""
        return int(settings["transformer.sample_size"]) * self.downscaling(settings)

    def set_resolution(self, config: dict[str, Any], positions: int) -> dict[str, Any]:
        """sample_size, where diffusers pipelines look for their default size.

        Positions were once computed by it; an export has the base's, in a buffer that its weights hold.
        """
        return config | {"sample_size": positions}

    def check_trainable(self, settings: "BaseSettings") -> None:
        """Refuse another VAE than the transformer's."""
        if settings["transformer.in_channels"] != settings["vae.latent_channels"]:
            raise InputError(
                f"{settings.directory / _TRANSFORMER}: in_channels is {settings['transformer.in_channels']}, but "
                f"latent_channels of the VAE is {settings['vae.latent_channels']}; expected a base model that takes "
                f"noisy latents alone"
            )

    def warning(self, settings: "BaseSettings") -> str | None:
        """Warn of a copy without T5 whose index has one."""
        directory = settings.directory
        index = read_json(directory / "model_index.json")
        if index.get(_T5, [None, None]) == [None, None] or any(part.folder == _T5 for part in self.parts(directory)):
            return None
        return (
            f"the base model was copied without {_T5} (T5), so its text is zeros in training and samples; copy it too, "
            f"or write [null, null] for it in model_index.json"
        )

    def tokenizer(self, directory: Path, folder: str = "tokenizer") -> "PreTrainedTokenizerBase":
        """Tokenizers of CLIP, the second of which pads with "!", and of T5."""
        return load_tokenizer(directory, *_tokenizer(folder))

    def tokenize(self, directory: Path, prompts: Sequence[str]) -> Tensors:
        """Token ids (N, 77) for each CLIP, and (N, 256) for T5 if there is one. None takes a mask."""
        first = self.tokenizer(directory)
        lengths = dict.fromkeys(("text_encoder", "text_encoder_2"), first.model_max_length) | {_T5: _T5_TOKENS}
        folders = [part.folder for part in self.text_encoders(directory)]
        return {
            f"{folder}.input_ids": padded_ids(
                self.tokenizer(directory, folder.replace("text_encoder", "tokenizer")), prompts, lengths[folder]
            )
            for folder in folders
        }

    def encode_with(self, folder: str, text_encoder: "nn.Module", tokens: Tensors) -> Tensors:
        """Last hidden states but one and pooled text of a CLIP, last hidden states of T5."""
        if folder == _T5:
            return {f"{folder}.states": text_encoder(tokens[f"{folder}.input_ids"]).last_hidden_state}
        return encode_with_clip(folder, text_encoder, tokens)

    def join(self, encoded: Tensors) -> Tensors:
        """States (N, 77, D) of both CLIPs side by side, in front of T5's (N, 256, D) if there is one; pooled text."""
        import torch

        clips = "text_encoder", "text_encoder_2"
        states = torch.cat([encoded[f"{folder}.states"] for folder in clips], dim=-1)
        pooled = torch.cat([encoded[f"{folder}.pooled"] for folder in clips], dim=-1)
        if (third := encoded.get(f"{_T5}.states")) is not None:
            states = torch.cat([_widened(states, third.shape[-1]), third], dim=1)
        return {"states": states, "pooled": pooled}

    # Noise and denoiser.

    def process(self, directory: Path, shape: tuple[int, int, int]) -> "Process":
        """Rectified flow, drawn with the sampler's shift (section 5.3.2)."""
        from dreambooth.models.process import RectifiedFlow

        settings = read_json(directory / "scheduler" / "scheduler_config.json")
        return RectifiedFlow(shift=float(settings.get("shift", 1.0)))

    def without_gradient(self, owner: str, module: "nn.Module") -> Iterable[str]:
        """Queries of the text in the last block, whose text nothing reads."""
        if owner != "denoiser":
            return ()
        last = f"transformer_blocks.{module.config.num_layers - 1}.attn."  # type: ignore[operator, union-attr]
        unread = (f"{last}add_q_proj.", f"{last}norm_added_q.")
        return [name for name, _ in module.named_parameters() if name.startswith(unread)]

    def kept(self, directory: Path, folder: str) -> Iterable[str]:
        """The first CLIP's projection where it is the identity, as in the published bases: single files have no place
        for it, and their readers take the identity.
        """
        part = self.component(folder)
        if folder != "text_encoder" or (has_weights(directory, part) and not is_identity(directory, part, _PROJECTION)):
            return []
        return [_PROJECTION]  # of configurations alone, as of the published weights

    def arguments(
        self, config: Any, noisy: "Tensor", timesteps: "Tensor", text: Tensors, conditions: Tensors
    ) -> dict[str, Any]:
        """Noisy latents, 1000 sigma, text and pooled text; zeros stand where T5 is missing."""
        import torch

        states, width = text["states"], config.joint_attention_dim
        if states.shape[-1] != width:
            zeros = states.new_zeros(len(states), _T5_TOKENS, width)
            states = torch.cat([_widened(states, width), zeros], dim=1)
        return {
            "hidden_states": noisy,
            "timestep": 1000 * timesteps,
            "encoder_hidden_states": states,
            "pooled_projections": text["pooled"],
        }

    def single_file_names(self, directory: Path, folder: str, names: Iterable[str]) -> Names:
        """Names of the files that hold the text encoders too.

        They have no projection of the first CLIP, for which every reader takes the identity.
        """
        if folder == "transformer":
            return _transformer_names(list(names))
        if folder == "vae":
            return original.vae_names(names)
        if folder == _T5:
            return original.t5_names(names)
        if folder == "text_encoder_2":
            return original.clip_names(names, original.CLIP_G)
        return original.clip_names([name for name in names if name != _PROJECTION], original.CLIP_L)

    # Sampling.

    def pipeline(self, directory: Path, modules: Mapping[str, Any]) -> Any:
        """StableDiffusion3Pipeline with its own sampler, Euler's method."""
        from diffusers import StableDiffusion3Pipeline

        with_t5 = _T5 in modules
        return StableDiffusion3Pipeline(
            **{_T5: None, **modules},
            tokenizer=read_tokenizer(directory, *_tokenizer("tokenizer")),
            tokenizer_2=read_tokenizer(directory, *_tokenizer("tokenizer_2")),
            tokenizer_3=read_tokenizer(directory, *_tokenizer("tokenizer_3")) if with_t5 else None,
            scheduler=flow_scheduler(directory),
        )

    def prompt_arguments(self, pipeline: Any, prompts: Sequence[str], *, guided: bool) -> Tensors:
        """States and pooled text, and those of "" if `guided`."""
        return clip_prompt_arguments(pipeline, prompts, guided=guided, prompt_2=None, prompt_3=None)


def _tokenizer(folder: str) -> tuple[str, str, str | None]:
    """Class, folder, and the CLIP whose positions it has to fit."""
    if folder == "tokenizer_3":
        return "T5TokenizerFast", folder, None
    return "CLIPTokenizer", folder, folder.replace("tokenizer", "text_encoder")


def _transformer_names(names: list[str]) -> Names:
    """Query, key and value in one; scale and shift in the other order where nothing is gated."""
    last = max((int(name.split(".")[1]) for name in names if name.startswith("transformer_blocks.")), default=0)
    swapped = ("norm_out.", f"transformer_blocks.{last}.norm1_context.")

    def placed(name: str) -> Placed:
        fused = re.search(r"\.(?:to|add)_([qkv])(?:_proj)?\.", name)
        return Placed(
            name=original.renamed(name, _SINGLE_FILE, original.DENOISER),
            place="qkv".index(fused[1]) if fused else 0,
            form="swapped" if name.startswith(swapped) else "same",
        )

    return {name: placed(name) for name in names}


def _widened(states: "Tensor", width: int) -> "Tensor":
    """(N, L, D) with zeros up to `width`."""
    from torch.nn.functional import pad

    return pad(states, (0, width - states.shape[-1]))
