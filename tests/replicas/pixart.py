"""PixArt-Sigma-XL-2-512-MS."""

from pathlib import Path

from replicas.parts import autoencoder, save, t5_encoder, write_index, write_t5_tokenizer


def build(folder: Path) -> None:
    """Noise and variance predicted of SDXL's latents; T5 in shards, and its tokenizer as spiece.model alone."""
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    ids = write_t5_tokenizer(folder / "tokenizer", fast=False)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        interpolation_scale=1,
        use_additional_conditions=False,
        caption_channels=32,
    )
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    save(folder, transformer=transformer, vae=autoencoder(4, scaling_factor=0.13025), scheduler=scheduler)
    t5_encoder(32, ids).save_pretrained(folder / "text_encoder", max_shard_size="30KB")
    parts: dict[str, str | None] = {
        "scheduler": "diffusers.DPMSolverMultistepScheduler",
        "text_encoder": "transformers.T5EncoderModel",
        "tokenizer": "transformers.T5Tokenizer",
        "transformer": "diffusers.PixArtTransformer2DModel",
        "vae": "diffusers.AutoencoderKL",
    }
    write_index(folder, "PixArtSigmaPipeline", parts)
