"""FLUX.1-dev and schnell, tiny."""

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from tests.replicas.parts import clip_text, clip_tokenizer, hub_names, t5_encoder, t5_tokenizer, vae, write_index

PARTS = {
    "scheduler": "diffusers.FlowMatchEulerDiscreteScheduler",
    "text_encoder": "transformers.CLIPTextModel",
    "text_encoder_2": "transformers.T5EncoderModel",
    "tokenizer": "transformers.CLIPTokenizer",
    "tokenizer_2": "transformers.T5TokenizerFast",
    "transformer": "diffusers.FluxTransformer2DModel",
    "vae": "diffusers.AutoencoderKL",
}


def build(folder: Path, *, dev: bool = True) -> None:
    """Dev: shifted by the picture's size, with a guidance embedding; the transformer and T5 in shards."""
    clip_ids = clip_tokenizer(folder / "tokenizer")
    t5_ids = t5_tokenizer(folder / "tokenizer_2", fast=True)
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
    vae(
        16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    ).save_pretrained(folder / "vae")
    clip_text(clip_ids, 16).save_pretrained(folder / "text_encoder")
    hub_names(folder / "text_encoder" / "model.safetensors")
    t5_encoder(t5_ids, 32).save_pretrained(folder / "text_encoder_2", max_shard_size="30KB")
    FlowMatchEulerDiscreteScheduler(
        shift=3.0 if dev else 1.0, use_dynamic_shifting=dev, base_shift=0.5, max_shift=1.15
    ).save_pretrained(folder / "scheduler")
    write_index(folder, "FluxPipeline", PARTS)


def build_schnell(folder: Path) -> None:
    """Schnell: neither shift nor guidance embedding."""
    build(folder, dev=False)
