"""DeepFloyd IF, the open kin of Imagen (arXiv 2205.11487): UNets on pixels, with T5 as text encoder.

Stage I makes pictures of 64 pixels a side, stage II scales them up fourfold. Both predict noise and its variance; the
noise alone is trained, so an exported model samples with a fixed variance, as diffusers' own script leaves it.
"""

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from dreambooth.errors import InputError
from dreambooth.models.component import Component, denoiser_part, scheduler_part, tokenizer_part
from dreambooth.models.config_fields import COUNT, Field, list_of, or_null, read_json, whole
from dreambooth.models.families.defaults import Defaults
from dreambooth.models.families.family import Tensors
from dreambooth.models.families.stable_diffusion import (
    SCHEDULE_FIELDS,
    UNET_FIELDS,
    DiffusionUNet,
    dpm_solver,
    field,
    load_diffusion,
)
from dreambooth.models.families.t5_text import t5_part
from dreambooth.models.families.tokenizers import load_tokenizer, padded_with_mask, read_tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Generator, Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from dreambooth.models.base_settings import BaseSettings
    from dreambooth.models.process import Process, SuperResolution

_COLOURS = 3
_TOKENS = 77
"""Tokens of a prompt, as the models were trained; T5 could read more."""
_SCALED_UP = 4
_NOISING = "image_noising_scheduler"
_LEVELS = "_levels"
"""How many levels of the small picture's noise a stage II is tuned on, if not all; diffusers passes over the name."""

_COMPONENTS = (
    denoiser_part("unet", "UNet2DConditionModel"),
    t5_part("text_encoder"),
    tokenizer_part("tokenizer", "T5Tokenizer"),
    scheduler_part("DDPMScheduler"),
)


class PixelUNet(DiffusionUNet):
    """A UNet on pixels that reads T5's states, which T5's attention mask keeps clear of padding."""

    components: tuple[Component, ...] = _COMPONENTS
    fields: tuple[Field, ...] = (
        *UNET_FIELDS,
        field(
            "unet/config.json", "block_out_channels", (320, 640, 1280, 1280), "a list of whole numbers", list_of(whole)
        ),
        *SCHEDULE_FIELDS,
    )
    t5_tokens = _TOKENS
    t5_masked = True
    only_squares = True
    lora_folders = ("unet",)
    loaded_with: ClassVar[Mapping[str, Any]] = {"requires_safety_checker": False}
    called_with: ClassVar[Mapping[str, Any]] = {"clean_caption": False}
    inputs: int
    """Channels that the UNet takes."""

    def downscaling(self, settings: "BaseSettings") -> int:
        """There is no VAE."""
        return 1

    def side_multiple(self, settings: "BaseSettings") -> int:
        """The UNet halves between its blocks, and doubles: it knows no odd sides."""
        return int(2 ** (len(settings["unet.block_out_channels"]) - 1))

    def channels(self, settings: "BaseSettings") -> int:
        """Red, green and blue."""
        return _COLOURS

    def check_trainable(self, settings: "BaseSettings") -> None:
        """Refuse other inputs."""
        if settings["unet.in_channels"] != self.inputs:
            raise InputError(
                f"{settings.directory / 'unet' / 'config.json'}: in_channels is {settings['unet.in_channels']}; "
                f"expected {self.inputs}, as {self.name} has"
            )

    def partly_without_gradient(self, denoiser: "nn.Module") -> Iterable[str]:
        """The last convolution, whose rows for the variance have none."""
        return ("conv_out.weight", "conv_out.bias")

    def tokenizer(self, directory: Path, folder: str = "tokenizer") -> "PreTrainedTokenizerBase":
        """T5's tokenizer, which reads 77 tokens in lower case."""
        return _in_lower_case(load_tokenizer(directory, "T5Tokenizer", folder))

    def tokenize(self, directory: Path, prompts: Sequence[str]) -> Tensors:
        """Token ids and attention mask (N, 77) of prompts in lower case, without space around them."""
        prompts = [prompt.lower().strip() for prompt in prompts]
        ids, mask = padded_with_mask(self.tokenizer(directory), prompts)
        return {"text_encoder.input_ids": ids, "text_encoder.attention_mask": mask}

    def encode_with(self, folder: str, text_encoder: "nn.Module", tokens: Tensors) -> Tensors:
        """Last hidden state (N, 77, D); the UNet sees all of it, padding too."""
        ids, mask = tokens[f"{folder}.input_ids"], tokens[f"{folder}.attention_mask"]
        readable = None if mask.is_meta else mask  # its values would be looked at
        return {f"{folder}.states": text_encoder(ids, attention_mask=readable).last_hidden_state}

    def encode_images(self, vae: Any, pixels: "Tensor") -> "tuple[Tensor, Tensor]":
        """The pixels."""
        import torch

        return pixels.cpu(), torch.zeros_like(pixels, device="cpu")

    def prediction(self, output: "Tensor", like: "Tensor") -> "Tensor":
        """The noise, without its variance."""
        return output[:, : like.shape[1]]

    def finish_export(self, directory: Path) -> None:
        """A fixed variance for samplers that need one: that of the base fits the noise that it predicted."""
        path = directory / "scheduler" / "scheduler_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"variance_type": "fixed_small"}, indent=2) + "\n")

    @abstractmethod
    def assemble(self, directory: Path, parts: Mapping[str, Any]) -> Any:
        """The pipeline of parts by name."""

    def pipeline(self, directory: Path, modules: Mapping[str, Any]) -> Any:
        """Pipeline without watermark, by DPM-Solver++ (arXiv 2211.01095), thresholded as the base's scheduler."""
        unused = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
        parts = {
            "tokenizer": read_tokenizer(directory, "T5Tokenizer", "tokenizer"),
            "scheduler": dpm_solver(directory),
            "requires_safety_checker": False,
        }
        return self.assemble(directory, {**modules, **parts, **unused})

    output_type = "pt"

    def decode(self, pipeline: Any, x0: "Tensor", *, height: int | None, width: int | None) -> "Tensor":
        """The pixels."""
        return x0


class DeepFloydI(PixelUNet):
    """Stage I, a text-to-image model on its own."""

    name = "DeepFloyd IF, stage I"
    pipeline_class = "IFPipeline"
    defaults = Defaults(text_encoders=(), learning_rate=1e-7, guidance_scale=7.0)
    inputs = _COLOURS

    def assemble(self, directory: Path, parts: Mapping[str, Any]) -> Any:
        """IFPipeline."""
        from diffusers import IFPipeline

        return IFPipeline(**parts)


class DeepFloydII(PixelUNet):
    """Stage II: beside x_t the UNet sees the small picture, scaled up and noised; the level of that noise is its class.

    That is what sampling gives it. diffusers' training script gives x_t twice instead, and its timestep as the level.
    """

    name = "DeepFloyd IF, stage II"
    pipeline_class = "IFSuperResolutionPipeline"
    components = (*_COMPONENTS, Component(folder=_NOISING, role="scheduler", library="diffusers", kind="DDPMScheduler"))
    defaults = Defaults(text_encoders=(), learning_rate=1e-7, num_inference_steps=25, guidance_scale=4.0)
    fields = (
        *PixelUNet.fields,
        field(f"{_NOISING}/scheduler_config.json", _LEVELS, None, f"null or {COUNT}", or_null(whole)),
    )
    scales_up = _SCALED_UP
    inputs = 2 * _COLOURS

    def reads_text(self, config: Mapping[str, Any]) -> bool:
        """Whether the UNet has cross-attention, or takes the text beside its timestep."""
        kinds = [config.get(name, "CrossAttn") for name in ("down_block_types", "mid_block_type", "up_block_types")]
        return config.get("addition_embed_type") is not None or "CrossAttn" in json.dumps(kinds)

    def process(self, directory: Path, shape: tuple[int, int, int]) -> "Process":
        """The diffusion of the base's scheduler, and that of the small picture."""
        from dreambooth.models.process import SuperResolution

        large, small = load_diffusion(directory), load_diffusion(directory, _NOISING)
        levels = read_json(directory / _NOISING / "scheduler_config.json").get(_LEVELS)
        return SuperResolution(
            alphas_cumprod=large.alphas_cumprod,
            prediction_type=large.prediction_type,
            small=small,
            factor=_SCALED_UP,
            levels=levels or len(small.alphas_cumprod),
        )

    def draw_conditions(self, process: "Process", x0: "Tensor", conditions: Tensors, rng: "Generator") -> Tensors:
        """The small picture in x0's shape and the level of its noise."""
        small, level = cast("SuperResolution", process).draw_small(x0, rng)
        return {"small": small, "noise_level": level}

    def arguments(
        self, config: Any, noisy: "Tensor", timesteps: "Tensor", text: Tensors, conditions: Tensors
    ) -> dict[str, Any]:
        """x_t and the small picture as one, and its noise level besides."""
        import torch

        sample = torch.cat([noisy, conditions["small"]], dim=1)
        further = {"class_labels": conditions["noise_level"]}
        return super().arguments(config, sample, timesteps, text, conditions) | further

    def check_noise_levels(self, directory: Path, levels: int) -> None:
        """Refuse more levels than the small picture's scheduler has timesteps."""
        timesteps = read_json(directory / _NOISING / "scheduler_config.json").get("num_train_timesteps", 1000)
        if levels > timesteps:
            raise InputError(
                f"super_resolution.noise_levels is {levels}, but {_NOISING} of the second stage has {timesteps} "
                f"timesteps; expected a whole number from 1 to {timesteps}"
            )

    def set_noise_levels(self, directory: Path, levels: int) -> None:
        """Write them where `image_arguments` and the next fine-tuning read them."""
        path = directory / _NOISING / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {_LEVELS: levels}, indent=2) + "\n")

    def sample_noise_levels(self, pipeline: Any, levels: int) -> None:
        """Put them into a loaded pipeline's configuration."""
        pipeline.image_noising_scheduler.register_to_config(**{_LEVELS: levels})

    def assemble(self, directory: Path, parts: Mapping[str, Any]) -> Any:
        """IFSuperResolutionPipeline, whose call needs an image."""
        from diffusers import DDPMScheduler, IFSuperResolutionPipeline

        noising = DDPMScheduler.from_pretrained(directory, subfolder=_NOISING, local_files_only=True)
        return IFSuperResolutionPipeline(**parts, image_noising_scheduler=noising)

    def image_arguments(self, pipeline: Any, images: "Sequence[Image]") -> dict[str, Any]:
        """The pictures, and the level of their noise."""
        return {"image": list(images), **_noise_level(pipeline.image_noising_scheduler.config)}

    def served_call(self, settings: "BaseSettings", noise_levels: int | None) -> dict[str, Any]:
        """The level of the pictures' noise and the guidance scale, too."""
        noising = read_json(settings.directory / _NOISING / "scheduler_config.json")
        tuned = noising if noise_levels is None else noising | {_LEVELS: noise_levels}
        scale = self.guidance_scale(read_json(settings.directory / "unet" / "config.json"))
        return {**self.called_with, **_noise_level(tuned), "guidance_scale": scale}


def _noise_level(noising: Mapping[str, Any]) -> dict[str, int]:
    """A quarter of the levels: that is 250 of IF's 1000, the pipeline's own default."""
    return {"noise_level": (noising.get(_LEVELS) or noising.get("num_train_timesteps", 1000)) // 4}


@lru_cache(maxsize=16)
def _in_lower_case(tokenizer: Any) -> "PreTrainedTokenizerBase":
    """A tokenizer that reads as the pipelines do: at most 77 tokens, in lower case."""
    from tokenizers import normalizers

    tokenizer.model_max_length = _TOKENS
    backend = tokenizer.backend_tokenizer
    others = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others])
    return cast("PreTrainedTokenizerBase", tokenizer)
