"""PixArt-Sigma-XL-2-512-MS, tiny."""

from pathlib import Path

from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

from tests.replicas.parts import t5_encoder, t5_tokenizer, vae, write_index


def build(folder: Path) -> None:
    """Noise and variance predicted of SDXL's latents; T5 in shards, and its tokenizer as spiece.model alone."""
    ids = t5_tokenizer(folder / "tokenizer", fast=False)
    PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        interpolation_scale=1,
        use_additional_conditions=False,
        caption_channels=32,
    ).save_pretrained(folder / "transformer")
    vae(4, scaling_factor=0.13025).save_pretrained(folder / "vae")
    t5_encoder(ids, 32).save_pretrained(folder / "text_encoder", max_shard_size="30KB")
    DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear").save_pretrained(
        folder / "scheduler"
    )
    parts = {
        "scheduler": "diffusers.DPMSolverMultistepScheduler",
        "text_encoder": "transformers.T5EncoderModel",
        "tokenizer": "transformers.T5Tokenizer",
        "transformer": "diffusers.PixArtTransformer2DModel",
        "vae": "diffusers.AutoencoderKL",
    }
    write_index(folder, "PixArtSigmaPipeline", parts)
