"""Stable Diffusion 1 and 2 and every model of their shape, the miniature among them: one CLIP text encoder."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import CLIPTokenizer


class StableDiffusion:
    """UNet2DConditionModel on the last hidden state of a CLIPTextModel."""

    pipeline_class = "StableDiffusionPipeline"
    components: tuple[str, ...] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    def load_denoiser(self, directory: Path) -> "nn.Module":
        """The UNet, in fp32."""
        import torch
        from diffusers import UNet2DConditionModel

        unet: nn.Module = UNet2DConditionModel.from_pretrained(
            directory, subfolder="unet", dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
        return unet

    def load_text_encoder(self, directory: Path) -> "nn.Module":
        """The CLIP text encoder, in fp32."""
        import torch
        from transformers import CLIPTextModel

        text_encoder: nn.Module = CLIPTextModel.from_pretrained(
            directory, subfolder="text_encoder", dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
        return text_encoder

    def empty_components(self, directory: Path, *, device: str = "meta") -> "tuple[nn.Module, nn.Module]":
        """(UNet, CLIP text encoder) with weights that nobody has set: on the meta device, shapes alone."""
        import torch
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        with torch.device(device):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(directory / "unet"))
            text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(directory / "text_encoder"))
        return unet, text_encoder

    def tokenize(self, directory: Path, prompts: list[str]) -> "Tensor":
        """Token ids (N, L), padded to the tokenizer's own length."""
        tokenizer = load_tokenizer(directory)
        ids: Tensor = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        return ids

    def encode_text(self, text_encoder: "nn.Module", input_ids: "Tensor") -> "Tensor":
        """Last hidden state (N, L, D), as StableDiffusionPipeline uses it."""
        encoder_hidden_states: Tensor = text_encoder(input_ids).last_hidden_state
        return encoder_hidden_states

    def denoise(
        self, denoiser: "nn.Module", noisy_latents: "Tensor", timesteps: "Tensor", encoder_hidden_states: "Tensor"
    ) -> "Tensor":
        """model_pred (N, C, H, W): noise or velocity, as the base's scheduler says."""
        model_pred: Tensor = denoiser(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
        return model_pred


@cache
def load_tokenizer(directory: Path) -> "CLIPTokenizer":
    """The tokenizer of a pipeline directory."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(directory, subfolder="tokenizer", local_files_only=True)
