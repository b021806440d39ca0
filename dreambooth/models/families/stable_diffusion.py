"""Stable Diffusion 1 and 2 and models of their architecture, such as the miniature: one CLIP text encoder."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
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
from dreambooth.models.config_fields import (
    COUNT,
    NUMBER,
    Field,
    first_numbers,
    flag,
    is_version,
    list_of,
    number,
    or_null,
    positive,
    read_json,
    size,
    whole,
)
from dreambooth.models.families import original_names as original
from dreambooth.models.families.defaults import Defaults
from dreambooth.models.families.family import Family, Tensors
from dreambooth.models.families.schedulers import sampler_settings
from dreambooth.models.families.tokenizers import each_once, load_tokenizer, padded_ids, read_tokenizer
from dreambooth.models.placed import Names

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from dreambooth.models.base_settings import BaseSettings
    from dreambooth.models.families.computed_once import KeptText
    from dreambooth.models.process import Diffusion, Process

_UNET, _VAE, _TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
_SCHEDULER, _TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
_PREDICTIONS = ("epsilon", "v_prediction", "sample")


def field(file: str, name: str, default: Any, expected: str, holds: Any) -> Field:
    """A field of a configuration file."""
    return Field(file=file, name=name, default=default, expected=expected, holds=holds)


VAE_FIELDS = (
    field(_VAE, "block_out_channels", (64,), "a list of whole numbers", list_of(whole)),
    field(_VAE, "latent_channels", 4, COUNT, whole),
    field(_VAE, "scaling_factor", 0.18215, NUMBER, positive),
    field(_VAE, "shift_factor", None, "null or a number", or_null(number)),
)
SCHEDULE_FIELDS = (
    field(_SCHEDULER, "prediction_type", "epsilon", " or ".join(_PREDICTIONS), lambda value: value in _PREDICTIONS),
    field(_SCHEDULER, "num_train_timesteps", 1000, COUNT, whole),
    field(_SCHEDULER, "beta_start", 0.0001, NUMBER, positive),
    field(_SCHEDULER, "beta_end", 0.02, NUMBER, positive),
    field(_SCHEDULER, "beta_schedule", "linear", f"one of {', '.join(_SCHEDULES)}", lambda value: value in _SCHEDULES),
    field(_SCHEDULER, "trained_betas", None, "null or a list of numbers", or_null(list_of(number))),
    field(_SCHEDULER, "rescale_betas_zero_snr", False, "true or false", flag),
)
UNET_FIELDS = (
    field(_UNET, "sample_size", None, "a whole number, two of them or null", or_null(size)),
    field(_UNET, "in_channels", 4, COUNT, whole),
    field(
        _UNET,
        "num_attention_heads",
        None,
        "null, as diffusers takes attention_head_dim of this class for the number of heads",
        lambda heads: heads is None,
    ),
    field(_UNET, "time_cond_proj_dim", None, f"null or {COUNT}", or_null(whole)),
)
_VERSION = field(_UNET, "_diffusers_version", None, 'a version such as "0.30.0"', is_version)
_LEAST_SIZE, _SIZES_RIGHT_SINCE = 64, (0, 9)
"""Where an earlier version of diffusers wrote a smaller sample_size, its pipeline takes it for a mistake."""
TEXT_FIELDS = (
    field(_TEXT, "hidden_size", 512, COUNT, whole),
    field(_TEXT, "max_position_embeddings", 77, COUNT, whole),
    field(_TOKENIZER, "model_max_length", None, f"null or {NUMBER}", or_null(positive)),
)


class DiffusionUNet(Family):
    """A UNet2DConditionModel with a diffusion process."""

    def resolution(self, settings: "BaseSettings") -> int:
        """Pixels by the UNet's sample_size."""
        sample_size = settings["unet.sample_size"]
        sides = set(sample_size) if isinstance(sample_size, list) else {sample_size}
        if None in sides or len(sides) > 1:
            raise InputError(
                f"{settings.directory / _UNET}: sample_size is {json.dumps(sample_size)}, which names no square that "
                f"the model was trained at; give it yourself: images.resolution for training, --height and --width for "
                f"samples"
            )
        return int(sides.pop()) * self.downscaling(settings)

    def set_resolution(self, config: dict[str, Any], positions: int) -> dict[str, Any]:
        """sample_size, where diffusers pipelines look for their default size."""
        import diffusers

        # A size below 64 that an early version of diffusers has written would be taken for a mistake.
        return config | {"sample_size": positions, "_diffusers_version": diffusers.__version__}

    def warning(self, settings: "BaseSettings") -> str | None:
        """Warn of a schedule whose last timestep can't be learnt."""
        if not settings["scheduler.rescale_betas_zero_snr"] or settings["scheduler.prediction_type"] != "epsilon":
            return None
        return (
            "the base model's schedule ends in pure noise (rescale_betas_zero_snr), and it predicts noise, which says "
            "nothing of the picture there (arXiv 2305.08891, section 3.2); if it was trained for velocity, its "
            "scheduler_config.json should say prediction_type v_prediction, else rescale_betas_zero_snr false"
        )

    def process(self, directory: Path, shape: tuple[int, int, int]) -> "Process":
        """The diffusion of the base's scheduler."""
        return load_diffusion(directory)

    def join(self, encoded: Tensors) -> Tensors:
        """The only states."""
        return {"states": encoded["text_encoder.states"]}

    def arguments(
        self, config: Any, noisy: "Tensor", timesteps: "Tensor", text: Tensors, conditions: Tensors
    ) -> dict[str, Any]:
        """Noisy latents, integer timesteps, encoder_hidden_states."""
        return {"sample": noisy, "timestep": timesteps, "encoder_hidden_states": text["states"]}

    def prompt_arguments(self, pipeline: Any, prompts: Sequence[str], *, guided: bool) -> Tensors:
        """prompt_embeds and negative_prompt_embeds."""
        texts, places = each_once([*prompts, ""])
        states, _ = pipeline.encode_prompt(
            texts, device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        chosen = states[places[:-1]]
        return {"prompt_embeds": chosen, "negative_prompt_embeds": states[places[-1:]].expand_as(chosen)}


class LatentUNet(DiffusionUNet):
    """A UNet2DConditionModel on the latents of an AutoencoderKL."""

    def channels(self, settings: "BaseSettings") -> int:
        """Channels of a latent."""
        return int(settings["unet.in_channels"])

    def check_trainable(self, settings: "BaseSettings") -> None:
        """Refuse inputs besides noisy latents, timestep and text."""
        path = settings.directory / _UNET
        if settings["unet.in_channels"] != settings["vae.latent_channels"]:
            raise InputError(
                f"{path}: in_channels is {settings['unet.in_channels']}, but latent_channels of the VAE is "
                f"{settings['vae.latent_channels']}; expected a base model that takes noisy latents alone (one for "
                f"inpainting takes more)"
            )
        if settings["unet.time_cond_proj_dim"] is not None:
            raise InputError(
                f"{path}: time_cond_proj_dim is {settings['unet.time_cond_proj_dim']}, so the UNet is distilled and "
                f"takes the guidance scale as an input, which it is not trained with here; give the model that it was "
                f"distilled from"
            )

    def guided(self, pipeline: Any, guidance_scale: float) -> bool:
        """A distilled UNet takes the scale as an input instead, and is asked once a step."""
        return guidance_scale > 1 and pipeline.unet.config.time_cond_proj_dim is None

    def computed_once(
        self, denoiser: "nn.Module", *, guided: bool, kept: "KeptText | None" = None
    ) -> AbstractContextManager[None]:
        """Keys and values of the text, and what lies before the first cross-attention."""
        from dreambooth.models.families.computed_once import computed_once

        return computed_once(denoiser, guided=guided, kept=kept)


class StableDiffusion(LatentUNet):
    """UNet2DConditionModel on the last hidden state of a CLIPTextModel."""

    name = "Stable Diffusion 1 and 2"
    pipeline_class = "StableDiffusionPipeline"
    components: tuple[Component, ...] = (
        denoiser_part("unet", "UNet2DConditionModel"),
        text_encoder_part("text_encoder", "CLIPTextModel"),
        VAE,
        tokenizer_part("tokenizer", "CLIPTokenizer"),
        scheduler_part("DDPMScheduler"),
    )
    defaults = Defaults(text_encoders=("text_encoder",))
    lora_folders = ("unet", "text_encoder")
    embedding_names: ClassVar[Mapping[str, str]] = {"text_encoder": "clip_l"}
    kohya_prefixes: ClassVar[Mapping[str, str]] = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    loaded_with: ClassVar[Mapping[str, Any]] = {"requires_safety_checker": False}
    fields = (*UNET_FIELDS, _VERSION, *VAE_FIELDS, *TEXT_FIELDS, *SCHEDULE_FIELDS)

    def resolution(self, settings: "BaseSettings") -> int:
        """Pixels by the UNet's sample_size, unless that is a mistake of early versions of diffusers."""
        side, version = super().resolution(settings), settings[_VERSION.key]
        if version is None or first_numbers(version) >= _SIZES_RIGHT_SINCE:
            return side
        if isinstance(settings["unet.sample_size"], list):
            return side
        return max(side, _LEAST_SIZE * self.downscaling(settings))

    def tokenizer(self, directory: Path, folder: str = "tokenizer") -> "PreTrainedTokenizerBase":
        """CLIP's tokenizer, which truncates at the text encoder's positions at the latest."""
        return load_tokenizer(directory, "CLIPTokenizer", folder, "text_encoder")

    def tokenize(self, directory: Path, prompts: Sequence[str]) -> Tensors:
        """Token ids (N, 77)."""
        return {"text_encoder.input_ids": padded_ids(self.tokenizer(directory), prompts)}

    def encode_with(self, folder: str, text_encoder: "nn.Module", tokens: Tensors) -> Tensors:
        """Last hidden state (N, L, D), as StableDiffusionPipeline uses it."""
        return {f"{folder}.states": text_encoder(tokens[f"{folder}.input_ids"]).last_hidden_state}

    def single_file_names(self, directory: Path, folder: str, names: Iterable[str]) -> Names:
        """Names of latent diffusion; OpenCLIP's for a text encoder that is one, which its activation shows."""
        if folder == "unet":
            return original.unet_names(names)
        if folder == "vae":
            return original.vae_names(names)
        if read_json(directory / _TEXT).get("hidden_act", "quick_gelu") == "gelu":
            return original.open_clip_names(names, original.OPEN_CLIP)
        return original.clip_names(names, original.CLIP)

    def pipeline(self, directory: Path, modules: Mapping[str, Any]) -> Any:
        """StableDiffusionPipeline with DPM-Solver++ (arXiv 2211.01095)."""
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            **modules,
            tokenizer=read_tokenizer(directory, "CLIPTokenizer", "tokenizer", "text_encoder"),
            scheduler=None,  # a pipeline changes the settings of one that it is made with
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.scheduler = dpm_solver(directory)
        return pipeline


def load_diffusion(directory: Path, folder: str = "scheduler") -> "Diffusion":
    """The diffusion of a base's scheduler, of whatever class: its betas and prediction type decide."""
    from diffusers import DDPMScheduler

    from dreambooth.models.process import Diffusion

    scheduler = DDPMScheduler.from_pretrained(directory, subfolder=folder, local_files_only=True)
    return Diffusion.from_scheduler(scheduler.alphas_cumprod, scheduler.config)


def dpm_solver(directory: Path, **settings: Any) -> Any:
    """DPM-Solver++ with a base's noise schedule, and thresholds if it has any."""
    from diffusers import DPMSolverMultistepScheduler as Sampler

    config = Sampler.load_config(directory, subfolder="scheduler", local_files_only=True)
    return Sampler.from_config(config, **(sampler_settings(directory) | settings))
