"""Stable Diffusion 1 and 2 and models of their architecture, such as the miniature: one CLIP text encoder."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import CLIPTokenizer


class StableDiffusion:
    """UNet2DConditionModel on the last hidden state of a CLIPTextModel."""

    pipeline_class = "StableDiffusionPipeline"
    components: tuple[str, ...] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    def load_denoiser(self, directory: Path, dtype: "torch.dtype | None" = None) -> "nn.Module":
        """The UNet, in fp32 unless another dtype is given."""
        from diffusers import UNet2DConditionModel

        return _load(UNet2DConditionModel, directory, "unet", dtype)

    def load_text_encoder(self, directory: Path, dtype: "torch.dtype | None" = None) -> "nn.Module":
        """The CLIP text encoder, in fp32 unless another dtype is given."""
        from transformers import CLIPTextModel

        return _load(CLIPTextModel, directory, "text_encoder", dtype)

    def empty_components(self, directory: Path, *, device: str = "meta") -> "tuple[nn.Module, nn.Module]":
        """(UNet, CLIP text encoder) with uninitialized weights; on the meta device they have shapes alone."""
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
        """model_pred (N, C, H, W): noise or velocity, by the base's scheduler."""
        model_pred: Tensor = denoiser(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
        return model_pred


def _load(kind: Any, directory: Path, part: str, dtype: "torch.dtype | None") -> "nn.Module":
    """Load a component by its class, ignoring other files of the repository. Never reads a pickle."""
    import torch

    component: nn.Module = kind.from_pretrained(
        directory, subfolder=part, dtype=dtype or torch.float32, local_files_only=True, use_safetensors=True
    )
    return component


def load_tokenizer(directory: Path) -> "CLIPTokenizer":
    """The tokenizer of a pipeline directory, cached while its files stay unchanged.

    Raises InputError for invalid files.
    """
    files = [*(directory / "tokenizer").glob("*"), directory / "text_encoder" / "config.json"]
    states = ((str(path), path.stat()) for path in sorted(files) if path.is_file())
    return _load_tokenizer(directory, tuple((name, state.st_size, state.st_mtime_ns) for name, state in states))


@lru_cache(maxsize=16)
def _load_tokenizer(directory: Path, files: tuple[tuple[str, int, int], ...]) -> "CLIPTokenizer":
    return read_tokenizer(directory)


def read_tokenizer(directory: Path) -> "CLIPTokenizer":
    """A new tokenizer, which truncates at the text encoder's positions at the latest.

    Raises InputError for invalid files.
    """
    from transformers import CLIPTextConfig, CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(directory, subfolder="tokenizer", local_files_only=True)
        positions = CLIPTextConfig.from_pretrained(directory / "text_encoder").max_position_embeddings
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    except Exception as error:  # noqa: BLE001 - the library raises whatever a damaged file leads it to
        raise InputError(
            f"the tokenizer in {directory / 'tokenizer'} can't be loaded: {type(error).__name__}: {error}; is the copy "
            f"complete?"
        ) from None
    if tokenizer.pad_token_id is None:
        raise InputError(f"the tokenizer in {directory / 'tokenizer'} has no pad_token; expected one, as <|endoftext|>")
    return tokenizer
