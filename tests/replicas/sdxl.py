"""stable-diffusion-xl-base-1.0: Euler, noise; two text encoders, pooled text and time ids."""

from pathlib import Path

from replicas.parts import BETAS, autoencoder, clip_text, save, write_clip_tokenizer, write_index

# After `parts`, which silences their notices.
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel  # isort: skip
from transformers import CLIPTextModel, CLIPTextModelWithProjection  # isort: skip


def build(folder: Path) -> None:
    """Stable Diffusion XL."""
    first = write_clip_tokenizer(folder / "tokenizer")
    second = write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    vae = autoencoder(4, scaling_factor=0.13025, force_upcast=True, sample_size=64)
    save(
        folder,
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=16 + 24,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + 6 * 8,  # pooled text of encoder 2, and six time ids
        ),
        vae=vae,
        vae_1_0=vae,  # the repository has this folder too; its index does not name it
        text_encoder=clip_text(CLIPTextModel, 16, first, activation="quick_gelu"),
        text_encoder_2=clip_text(CLIPTextModelWithProjection, 24, second, activation="gelu", projection=20),
        scheduler=EulerDiscreteScheduler(
            **BETAS, prediction_type="epsilon", steps_offset=1, timestep_spacing="leading", interpolation_type="linear"
        ),
    )
    parts: dict[str, str | None] = {
        "scheduler": "diffusers.EulerDiscreteScheduler",
        "text_encoder": "transformers.CLIPTextModel",
        "text_encoder_2": "transformers.CLIPTextModelWithProjection",
        "tokenizer": "transformers.CLIPTokenizer",
        "tokenizer_2": "transformers.CLIPTokenizer",
        "unet": "diffusers.UNet2DConditionModel",
        "vae": "diffusers.AutoencoderKL",
    }
    write_index(folder, "StableDiffusionXLPipeline", parts, force_zeros_for_empty_prompt=True)
