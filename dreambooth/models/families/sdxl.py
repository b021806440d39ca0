"""Stable Diffusion XL (arXiv 2307.01952): two CLIP text encoders, pooled text, sizes and crops as conditions."""

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
from dreambooth.models.families import original_names as original
from dreambooth.models.families.clip_text import after_states, encode_with_clip
from dreambooth.models.families.defaults import Defaults
from dreambooth.models.families.family import Tensors
from dreambooth.models.families.stable_diffusion import (
    SCHEDULE_FIELDS,
    TEXT_FIELDS,
    UNET_FIELDS,
    VAE_FIELDS,
    LatentUNet,
    dpm_solver,
    field,
)
from dreambooth.models.families.tokenizers import each_once, load_tokenizer, padded_ids, read_tokenizer
from dreambooth.models.placed import Names

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from dreambooth.models.base_settings import BaseSettings
    from dreambooth.models.families.computed_once import KeptText

_UNET = "unet/config.json"


class StableDiffusionXL(LatentUNet):
    """UNet2DConditionModel on the states of two CLIP text encoders, the second one's pooled text, and time ids."""

    name = "Stable Diffusion XL"
    pipeline_class = "StableDiffusionXLPipeline"
    components: tuple[Component, ...] = (
        denoiser_part("unet", "UNet2DConditionModel"),
        text_encoder_part("text_encoder", "CLIPTextModel"),
        text_encoder_part("text_encoder_2", "CLIPTextModelWithProjection"),
        VAE,
        tokenizer_part("tokenizer", "CLIPTokenizer"),
        tokenizer_part("tokenizer_2", "CLIPTokenizer"),
        scheduler_part("DDPMScheduler"),
    )
    defaults = Defaults(text_encoders=("text_encoder", "text_encoder_2"), guidance_scale=5.0)
    lora_folders = ("unet", "text_encoder", "text_encoder_2")
    embedding_names: ClassVar[Mapping[str, str]] = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    kohya_prefixes: ClassVar[Mapping[str, str]] = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_",
        "text_encoder_2": "lora_te2_",
    }
    kohya_original = ("unet",)
    loaded_with: ClassVar[Mapping[str, Any]] = {"add_watermarker": False}
    fields = (
        *UNET_FIELDS,
        field(_UNET, "addition_embed_type", None, 'null or "text_time"', lambda kind: kind in (None, "text_time")),
        *VAE_FIELDS,
        *TEXT_FIELDS,
        *SCHEDULE_FIELDS,
    )

    def check_trainable(self, settings: "BaseSettings") -> None:
        """Refuse also a UNet without pooled text and time ids."""
        super().check_trainable(settings)
        if settings["unet.addition_embed_type"] is None:
            raise InputError(
                f"{settings.directory / _UNET}: addition_embed_type is null; expected text_time, as the UNet of "
                f"Stable Diffusion XL takes pooled text and time ids. Is it the file that came with the base model?"
            )

    def without_gradient(self, owner: str, module: "nn.Module") -> Iterable[str]:
        """What lies behind the states of the first text encoder, which has no pooled text to give."""
        return after_states(module) if owner == "text_encoder" else ()

    def tokenizer(self, directory: Path, folder: str = "tokenizer") -> "PreTrainedTokenizerBase":
        """CLIP's tokenizers; the second pads with "!"."""
        return load_tokenizer(directory, "CLIPTokenizer", folder, folder.replace("tokenizer", "text_encoder"))

    def tokenize(self, directory: Path, prompts: Sequence[str]) -> Tensors:
        """Token ids (N, 77) for each encoder."""
        return {
            "text_encoder.input_ids": padded_ids(self.tokenizer(directory), prompts),
            "text_encoder_2.input_ids": padded_ids(self.tokenizer(directory, "tokenizer_2"), prompts),
        }

    def encode_with(self, folder: str, text_encoder: "nn.Module", tokens: Tensors) -> Tensors:
        """Last hidden states but one (N, L, D), and the second encoder's pooled text (N, P)."""
        return encode_with_clip(folder, text_encoder, tokens)

    def join(self, encoded: Tensors) -> Tensors:
        """States of both encoders side by side."""
        import torch

        states = torch.cat([encoded["text_encoder.states"], encoded["text_encoder_2.states"]], dim=-1)
        return {"states": states, "pooled": encoded["text_encoder_2.pooled"]}

    def no_text_is_zero(self, directory: Path) -> bool:
        """Whether zeros stand for no text, by the index, which may leave it out."""
        return bool(json.loads((directory / "model_index.json").read_text()).get("force_zeros_for_empty_prompt", True))

    def conditions(
        self, original: Sequence[tuple[int, int]], crops: Sequence[tuple[int, int]], size: tuple[int, int]
    ) -> Tensors:
        """time_ids (N, 6): original height and width, top and left of the crop, and `size` (sections 2.2 and 2.3).

        In fp32: bf16 would round 683 pixels to 684.
        """
        import torch

        rows = [[*whole, *corner, *size] for whole, corner in zip(original, crops, strict=True)]
        return {"time_ids": torch.tensor(rows, dtype=torch.float32)}

    def arguments(
        self, config: Any, noisy: "Tensor", timesteps: "Tensor", text: Tensors, conditions: Tensors
    ) -> dict[str, Any]:
        """Arguments of every UNet, and pooled text and time ids."""
        added = {"text_embeds": text["pooled"], "time_ids": conditions["time_ids"]}
        return super().arguments(config, noisy, timesteps, text, conditions) | {"added_cond_kwargs": added}

    def single_file_names(self, directory: Path, folder: str, names: Iterable[str]) -> Names:
        """Names of latent diffusion, OpenCLIP's for the second text encoder."""
        if folder == "unet":
            return original.unet_names(names)
        if folder == "vae":
            return original.vae_names(names)
        if folder == "text_encoder_2":
            return original.open_clip_names(names, original.OPEN_CLIP_XL)
        return original.clip_names(names, original.CLIP_XL)

    def pipeline(self, directory: Path, modules: Mapping[str, Any]) -> Any:
        """StableDiffusionXLPipeline with DPM-Solver++ (arXiv 2211.01095) and no watermark."""
        from diffusers import StableDiffusionXLPipeline

        pipeline = StableDiffusionXLPipeline(
            **modules,
            tokenizer=read_tokenizer(directory, "CLIPTokenizer", "tokenizer", "text_encoder"),
            tokenizer_2=read_tokenizer(directory, "CLIPTokenizer", "tokenizer_2", "text_encoder_2"),
            scheduler=None,
            force_zeros_for_empty_prompt=self.no_text_is_zero(directory),
            add_watermarker=False,
        )
        pipeline.scheduler = dpm_solver(directory)
        return pipeline

    def prompt_arguments(self, pipeline: Any, prompts: Sequence[str], *, guided: bool) -> Tensors:
        """States and pooled text, and those of no text: zeros, or those of "", as the base was trained."""
        return clip_prompt_arguments(pipeline, prompts, guided=guided)

    def computed_once(
        self, denoiser: "nn.Module", *, guided: bool, kept: "KeptText | None" = None
    ) -> AbstractContextManager[None]:
        """Keys and values of the text; pooled text makes the guided halves differ from the first layer on."""
        return super().computed_once(denoiser, guided=False, kept=kept)


def clip_prompt_arguments(pipeline: Any, prompts: Sequence[str], *, guided: bool, **settings: Any) -> Tensors:
    """What a pipeline with pooled text encodes of prompts, each text once, and of no text if `guided`.

    `settings` are further arguments of its encode_prompt.
    """
    texts, chosen = each_once(prompts)
    states, empty_states, pooled, empty_pooled = pipeline.encode_prompt(
        texts, device=pipeline.device, do_classifier_free_guidance=guided, **settings
    )
    arguments = {"prompt_embeds": states[chosen], "pooled_prompt_embeds": pooled[chosen]}
    if guided:
        # One row for each text, all the same.
        arguments["negative_prompt_embeds"] = empty_states[chosen]
        arguments["negative_pooled_prompt_embeds"] = empty_pooled[chosen]
    return arguments
