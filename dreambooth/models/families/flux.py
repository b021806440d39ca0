"""FLUX.1: a transformer on packed latents, CLIP's pooled text and T5's states, trained as a rectified flow."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
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
from dreambooth.models.config_fields import COUNT, NUMBER, flag, number, or_null, positive, read_json, whole
from dreambooth.models.families import original_names as original
from dreambooth.models.families.defaults import Defaults
from dreambooth.models.families.family import OWN_SIZE, Family, Tensors
from dreambooth.models.families.stable_diffusion import VAE_FIELDS, field
from dreambooth.models.families.t5_text import t5_part
from dreambooth.models.families.tokenizers import each_once, load_tokenizer, padded_ids, read_tokenizer
from dreambooth.models.placed import Names, Placed

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from dreambooth.models.base_settings import BaseSettings
    from dreambooth.models.process import Process

_TRANSFORMER, _SCHEDULER = "transformer/config.json", "scheduler/scheduler_config.json"
_TRAINING_GUIDANCE = 1.0
"""The dev model's guidance embedding in training.

It was distilled to give at scale w what classifier-free guidance gave at w, and the loss knows the plain velocity,
guidance 1. Trained at 3.5, it would learn that 3.5 means no guidance, and its pictures there go pale. SimpleTuner,
x-flux and the command in diffusers' README_flux.md train at 1, while the default of diffusers' script is 3.5.
"""

_DOUBLE, _SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
_SINGLE_FILE = (
    (r"x_embedder\.(\w+)", r"img_in.\1"),
    (r"context_embedder\.(\w+)", r"txt_in.\1"),
    (r"proj_out\.(\w+)", r"final_layer.linear.\1"),
    (r"norm_out\.linear\.(\w+)", r"final_layer.adaLN_modulation.1.\1"),
    (r"time_text_embed\.timestep_embedder\.linear_1\.(\w+)", r"time_in.in_layer.\1"),
    (r"time_text_embed\.timestep_embedder\.linear_2\.(\w+)", r"time_in.out_layer.\1"),
    (r"time_text_embed\.guidance_embedder\.linear_1\.(\w+)", r"guidance_in.in_layer.\1"),
    (r"time_text_embed\.guidance_embedder\.linear_2\.(\w+)", r"guidance_in.out_layer.\1"),
    (r"time_text_embed\.text_embedder\.linear_1\.(\w+)", r"vector_in.in_layer.\1"),
    (r"time_text_embed\.text_embedder\.linear_2\.(\w+)", r"vector_in.out_layer.\1"),
    (_DOUBLE + r"norm1\.linear\.(\w+)", r"double_blocks.\1.img_mod.lin.\2"),
    (_DOUBLE + r"norm1_context\.linear\.(\w+)", r"double_blocks.\1.txt_mod.lin.\2"),
    (_DOUBLE + r"attn\.to_[qkv]\.(\w+)", r"double_blocks.\1.img_attn.qkv.\2"),
    (_DOUBLE + r"attn\.add_[qkv]_proj\.(\w+)", r"double_blocks.\1.txt_attn.qkv.\2"),
    (_DOUBLE + r"attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
    (_DOUBLE + r"attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale"),
    (_DOUBLE + r"attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale"),
    (_DOUBLE + r"attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale"),
    (_DOUBLE + r"attn\.to_out\.0\.(\w+)", r"double_blocks.\1.img_attn.proj.\2"),
    (_DOUBLE + r"attn\.to_add_out\.(\w+)", r"double_blocks.\1.txt_attn.proj.\2"),
    (_DOUBLE + r"ff\.net\.0\.proj\.(\w+)", r"double_blocks.\1.img_mlp.0.\2"),
    (_DOUBLE + r"ff\.net\.2\.(\w+)", r"double_blocks.\1.img_mlp.2.\2"),
    (_DOUBLE + r"ff_context\.net\.0\.proj\.(\w+)", r"double_blocks.\1.txt_mlp.0.\2"),
    (_DOUBLE + r"ff_context\.net\.2\.(\w+)", r"double_blocks.\1.txt_mlp.2.\2"),
    (_SINGLE + r"norm\.linear\.(\w+)", r"single_blocks.\1.modulation.lin.\2"),
    (_SINGLE + r"(?:attn\.to_[qkv]|proj_mlp)\.(\w+)", r"single_blocks.\1.linear1.\2"),
    (_SINGLE + r"attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
    (_SINGLE + r"attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
    (_SINGLE + r"proj_out\.(\w+)", r"single_blocks.\1.linear2.\2"),
)
"""Names of the transformer's tensors in a single file, as in the published FLUX.1."""


class Flux(Family):
    """FluxTransformer2DModel of FLUX.1 dev, with a guidance embedding, and schnell, without."""

    name = "FLUX.1"
    pipeline_class = "FluxPipeline"
    components: tuple[Component, ...] = (
        denoiser_part("transformer", "FluxTransformer2DModel"),
        text_encoder_part("text_encoder", "CLIPTextModel"),
        t5_part("text_encoder_2"),
        VAE,
        tokenizer_part("tokenizer", "CLIPTokenizer"),
        tokenizer_part("tokenizer_2", "T5Tokenizer"),
        scheduler_part("FlowMatchEulerDiscreteScheduler"),
    )
    # T5's 4.8 billion parameters would take more memory than SDXL, for words that T5 already spells.
    defaults = Defaults(text_encoders=("text_encoder",), resolution=1024, num_inference_steps=28, guidance_scale=3.5)
    fields = (
        field(_TRANSFORMER, "in_channels", 64, COUNT, whole),
        field(_TRANSFORMER, "guidance_embeds", False, "true or false", flag),
        field(_TRANSFORMER, OWN_SIZE, None, f"null or {COUNT}", or_null(whole)),
        *VAE_FIELDS,
        field(
            _SCHEDULER,
            "_class_name",
            "FlowMatchEulerDiscreteScheduler",
            "a scheduler of flow matching, such as FlowMatchEulerDiscreteScheduler",
            lambda value: isinstance(value, str) and value.startswith("FlowMatch"),
        ),
        field(_SCHEDULER, "shift", 1.0, NUMBER, positive),
        field(_SCHEDULER, "use_dynamic_shifting", False, "true or false", flag),
        field(_SCHEDULER, "base_shift", 0.5, "a number", number),
        field(_SCHEDULER, "max_shift", 1.15, "a number", number),
        field(_SCHEDULER, "base_image_seq_len", 256, COUNT, whole),
        field(_SCHEDULER, "max_image_seq_len", 4096, COUNT, whole),
    )
    noise = "rectified flow"
    distilled_guidance = True
    lora_folders = ("transformer", "text_encoder")
    embedding_names: ClassVar[Mapping[str, str]] = {"text_encoder": "clip_l"}
    sampler = "FlowMatchEulerDiscreteScheduler"
    t5_tokens = 512
    packed = 2

    def side_multiple(self, settings: "BaseSettings") -> int:
        """Four positions of a latent are packed into one."""
        return 2 * self.downscaling(settings)

    def channels(self, settings: "BaseSettings") -> int:
        """Channels of a latent before packing."""
        return int(settings["vae.latent_channels"])

    def resolution(self, settings: "BaseSettings") -> int:
        """Pixels that an export of ours names, or the default: a published configuration names none."""
        positions = settings[f"transformer.{OWN_SIZE}"]
        return int(self.defaults.resolution or 0) if positions is None else positions * self.downscaling(settings)

    def set_resolution(self, config: dict[str, Any], positions: int) -> dict[str, Any]:
        """Write the resolution under a name that diffusers passes over."""
        return config | {OWN_SIZE: positions}

    def defaults_of(self, settings: "BaseSettings") -> Defaults:
        """Schnell samples in four steps, and takes no guidance."""
        if settings["transformer.guidance_embeds"]:
            return self.defaults
        return replace(self.defaults, num_inference_steps=4, guidance_scale=1.0)

    def check_trainable(self, settings: "BaseSettings") -> None:
        """Refuse inputs besides noisy latents and text: those of the fill, depth and canny models."""
        wanted, found = 4 * settings["vae.latent_channels"], settings["transformer.in_channels"]
        if found != wanted:
            raise InputError(
                f"{settings.directory / _TRANSFORMER}: in_channels is {found}, but the VAE's latents pack into "
                f"{wanted}; expected a base model that takes noisy latents alone (one for filling or control takes "
                f"more)"
            )

    def warning(self, settings: "BaseSettings") -> str | None:
        """Warn of schnell, whose distillation training undoes."""
        if settings["transformer.guidance_embeds"] or settings["scheduler.use_dynamic_shifting"]:
            return None
        return (
            "the base model is distilled to sample in a few steps (FLUX.1-schnell), which fine-tuning loosens: compare "
            "samples of more steps too (evaluation.num_inference_steps)"
        )

    # Text.

    def tokenizer(self, directory: Path, folder: str = "tokenizer") -> "PreTrainedTokenizerBase":
        """CLIP's, or T5's in tokenizer_2."""
        if folder == "tokenizer":
            return load_tokenizer(directory, "CLIPTokenizer", folder, "text_encoder")
        return load_tokenizer(directory, "T5Tokenizer", folder)

    def tokenize(self, directory: Path, prompts: Sequence[str]) -> Tensors:
        """Token ids of CLIP (N, 77) and T5 (N, 512), without masks."""
        return {
            "text_encoder.input_ids": padded_ids(self.tokenizer(directory), prompts),
            "text_encoder_2.input_ids": padded_ids(self.tokenizer(directory, "tokenizer_2"), prompts, self.t5_tokens),
        }

    def encode_with(self, folder: str, text_encoder: "nn.Module", tokens: Tensors) -> Tensors:
        """Pooled text (N, D) of CLIP, or states (N, L, D) of T5."""
        output = text_encoder(tokens[f"{folder}.input_ids"])
        if folder == "text_encoder":
            return {f"{folder}.pooled": output.pooler_output}
        return {f"{folder}.states": output.last_hidden_state}

    def join(self, encoded: Tensors) -> Tensors:
        """One of each."""
        return {"states": encoded["text_encoder_2.states"], "pooled": encoded["text_encoder.pooled"]}

    # Noise and denoiser.

    def process(self, directory: Path, shape: tuple[int, int, int]) -> "Process":
        """A rectified flow whose draw is shifted as the sampler's schedule is, the more the larger the picture.

        FLUX's own draw isn't published. The density before the shift is Stable Diffusion 3's (arXiv 2403.03206), by
        some of the same authors.
        """
        from dreambooth.models.process import RectifiedFlow

        content = read_json(directory / _SCHEDULER)
        schedule = {one.name: one.value(content, directory) for one in self.fields if one.file == _SCHEDULER}
        if not schedule["use_dynamic_shifting"]:
            return RectifiedFlow(shift=schedule["shift"])
        fewest, most = schedule["base_image_seq_len"], schedule["max_image_seq_len"]
        slope = (schedule["max_shift"] - schedule["base_shift"]) / (most - fewest)
        mu = schedule["base_shift"] + slope * (shape[1] // 2 * (shape[2] // 2) - fewest)
        return RectifiedFlow(shift=math.exp(mu))

    def arguments(
        self, config: Any, noisy: "Tensor", timesteps: "Tensor", text: Tensors, conditions: Tensors
    ) -> dict[str, Any]:
        """Packed latents (N, HW / 4, 4C), sigma, both texts, positions (HW / 4, 3), and guidance (N,) if embedded."""
        import torch

        states, (rows, columns) = text["states"], (noisy.shape[2] // 2, noisy.shape[3] // 2)
        arguments = {
            "hidden_states": packed(noisy),
            "timestep": timesteps.to(noisy.dtype),
            "encoder_hidden_states": states,
            "pooled_projections": text["pooled"],
            "txt_ids": states.new_zeros(states.shape[1], 3),
            "img_ids": _positions(rows, columns, noisy),
        }
        if config.guidance_embeds:
            guidance = torch.full((len(noisy),), _TRAINING_GUIDANCE, dtype=torch.float32, device=noisy.device)
            arguments["guidance"] = guidance
        return arguments

    def prediction(self, output: "Tensor", like: "Tensor") -> "Tensor":
        """Unpacked."""
        return unpacked(output, like.shape[2] // 2, like.shape[3] // 2)

    def single_file_names(self, directory: Path, folder: str, names: Iterable[str]) -> Names:
        """Names of ComfyUI's checkpoints of all parts."""
        if folder == "transformer":
            return {name: _placed(name) for name in names}
        if folder == "vae":
            return original.vae_names(names, original.VAE_OF_FLOWS)
        if folder == "text_encoder_2":
            return original.t5_names(names)
        return original.clip_names(names, original.CLIP_L)

    # Sampling.

    def pipeline(self, directory: Path, modules: Mapping[str, Any]) -> Any:
        """FluxPipeline with its Euler sampler."""
        from diffusers import FluxPipeline

        pipeline = FluxPipeline(
            **modules,
            tokenizer=read_tokenizer(directory, "CLIPTokenizer", "tokenizer", "text_encoder"),
            tokenizer_2=read_tokenizer(directory, "T5Tokenizer", "tokenizer_2"),
            scheduler=_scheduler(directory),
        )
        positions = read_json(directory / _TRANSFORMER).get(OWN_SIZE)
        if positions is not None:
            pipeline.default_sample_size = positions
        return pipeline

    def prompt_arguments(self, pipeline: Any, prompts: Sequence[str], *, guided: bool) -> Tensors:
        """prompt_embeds of T5 and pooled_prompt_embeds of CLIP."""
        texts, chosen = each_once(prompts)
        states, pooled, _ = pipeline.encode_prompt(texts, device=pipeline.device, max_sequence_length=self.t5_tokens)
        return {"prompt_embeds": states[chosen], "pooled_prompt_embeds": pooled[chosen]}

    def decode(self, pipeline: Any, x0: "Tensor", *, height: int | None, width: int | None) -> "Tensor":
        """Unpack, then as others."""
        side = pipeline.default_sample_size * pipeline.vae_scale_factor
        patch = 2 * pipeline.vae_scale_factor
        latents = unpacked(x0, (height or side) // patch, (width or side) // patch)
        return super().decode(pipeline, latents, height=height, width=width)


def _placed(name: str) -> Placed:
    """Query, key, value, and in a single block what the MLP reads, in one; scale and shift at the end exchanged."""
    fused = re.search(r"\.(?:to|add)_([qkv])(?:_proj)?\.", name)
    return Placed(
        name=original.renamed(name, _SINGLE_FILE, original.DENOISER),
        place="qkv".index(fused[1]) if fused else 3 if ".proj_mlp." in name else 0,
        form="swapped" if name.startswith("norm_out.") else "same",
    )


def packed(latents: "Tensor") -> "Tensor":
    """(N, C, H, W) as (N, HW / 4, 4C): squares of 2 x 2 positions become tokens, the channel slowest."""
    count, channels, height, width = latents.shape
    squares = latents.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(count, height // 2 * (width // 2), 4 * channels)


def unpacked(tokens: "Tensor", rows: int, columns: int) -> "Tensor":
    """The inverse of `packed`, for H = 2 rows and W = 2 columns."""
    count, _, width = tokens.shape
    squares = tokens.reshape(count, rows, columns, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(count, width // 4, 2 * rows, 2 * columns)


def _positions(rows: int, columns: int, like: "Tensor") -> "Tensor":
    """(0, row, column) of each token (rows * columns, 3)."""
    import torch

    axes = [torch.arange(length, dtype=like.dtype, device=like.device) for length in (1, rows, columns)]
    return torch.cartesian_prod(*axes)


def _scheduler(directory: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_pretrained(directory, subfolder="scheduler", local_files_only=True)
