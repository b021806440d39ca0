"""stable-diffusion-v1-5 (PNDM, noise), and stable-diffusion-2-1 (DDIM, velocity)."""

from pathlib import Path
from typing import Any

from replicas.parts import BETAS, autoencoder, clip_text, save, write_clip_tokenizer, write_index

# After `parts`, which silences their notices.
from diffusers import DDIMScheduler, PNDMScheduler, UNet2DConditionModel  # isort: skip
from transformers import CLIPTextModel  # isort: skip

_PARTS: dict[str, str | None] = {
    # Named by the index, but not downloaded: nothing here needs them.
    "feature_extractor": "transformers.CLIPImageProcessor",
    "safety_checker": "stable_diffusion.StableDiffusionSafetyChecker",
    "text_encoder": "transformers.CLIPTextModel",
    "tokenizer": "transformers.CLIPTokenizer",
    "unet": "diffusers.UNet2DConditionModel",
    "vae": "diffusers.AutoencoderKL",
}


def build(
    folder: Path, *, width: int = 16, layers: int = 3, channels: tuple[int, int] = (8, 16), depth: int = 1
) -> None:
    """Stable Diffusion 1.5."""
    ids = write_clip_tokenizer(folder / "tokenizer")
    save(
        folder,
        unet=_unet(cross_attention_dim=width, attention_head_dim=2, channels=channels, depth=depth),
        vae=autoencoder(4, scaling_factor=0.18215, sample_size=64),
        text_encoder=clip_text(CLIPTextModel, width, ids, activation="quick_gelu", layers=layers),
        scheduler=PNDMScheduler(
            **BETAS, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, prediction_type="epsilon"
        ),
    )
    write_index(folder, "StableDiffusionPipeline", _PARTS | {"scheduler": "diffusers.PNDMScheduler"})


def build_velocity(folder: Path) -> None:
    """Stable Diffusion 2.1."""
    ids = write_clip_tokenizer(folder / "tokenizer", pad="!")
    save(
        folder,
        unet=_unet(
            cross_attention_dim=24, attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True
        ),
        vae=autoencoder(4, scaling_factor=0.18215, sample_size=96),
        text_encoder=clip_text(CLIPTextModel, 24, ids, activation="gelu", projection=12),
        scheduler=DDIMScheduler(
            **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
        ),
    )
    parts = _PARTS | {"scheduler": "diffusers.DDIMScheduler", "safety_checker": None}
    write_index(folder, "StableDiffusionPipeline", parts, requires_safety_checker=False)


def _unet(channels: tuple[int, int] = (8, 16), depth: int = 1, **settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=depth,
        block_out_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **settings,
    )
