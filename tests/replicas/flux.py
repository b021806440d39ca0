"""FLUX.1-dev and schnell."""

from pathlib import Path

from replicas.parts import (
    autoencoder_without_quantization,
    clip_text,
    save,
    t5_encoder,
    write_clip_tokenizer,
    write_index,
    write_t5_tokenizer,
)


def build(folder: Path, *, dev: bool = True) -> None:
    """Dev: a draw shifted by the picture's size, and a guidance embedding; transformer and T5 in shards."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextModel

    clip_ids = write_clip_tokenizer(folder / "tokenizer")
    t5_ids = write_t5_tokenizer(folder / "tokenizer_2")
    save(
        folder,
        text_encoder=clip_text(CLIPTextModel, 16, clip_ids, activation="quick_gelu"),
        vae=autoencoder_without_quantization(scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dev else 1.0, use_dynamic_shifting=dev, base_shift=0.5, max_shift=1.15
        ),
    )
    t5_encoder(32, t5_ids).save_pretrained(folder / "text_encoder_2", max_shard_size="30KB")
    FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=(4, 6, 6),
    ).save_pretrained(folder / "transformer", max_shard_size="200KB")
    parts: dict[str, str | None] = {
        "scheduler": "diffusers.FlowMatchEulerDiscreteScheduler",
        "text_encoder": "transformers.CLIPTextModel",
        "text_encoder_2": "transformers.T5EncoderModel",
        "tokenizer": "transformers.CLIPTokenizer",
        "tokenizer_2": "transformers.T5TokenizerFast",
        "transformer": "diffusers.FluxTransformer2DModel",
        "vae": "diffusers.AutoencoderKL",
    }
    write_index(folder, "FluxPipeline", parts)


def build_schnell(folder: Path) -> None:
    """Schnell: neither shift nor guidance embedding."""
    build(folder, dev=False)
