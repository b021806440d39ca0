"""DeepFloyd IF, IF-I-M-v1.0 and IF-II-M-v1.0: pixels, a cosine schedule, noise and its variance, T5."""

from pathlib import Path
from typing import Any

from replicas.parts import save, t5_encoder, write_index, write_t5_tokenizer

# After `parts`, which silences their notices.
from diffusers import DDPMScheduler, UNet2DConditionModel  # isort: skip

_PARTS: dict[str, str | None] = {
    # Named by the index, but not downloaded: nothing here needs them.
    "feature_extractor": "transformers.CLIPImageProcessor",
    "safety_checker": "deepfloyd_if.IFSafetyChecker",
    "watermarker": "deepfloyd_if.IFWatermarker",
    "scheduler": "diffusers.DDPMScheduler",
    "text_encoder": "transformers.T5EncoderModel",
    "tokenizer": "transformers.T5Tokenizer",
    "unet": "diffusers.UNet2DConditionModel",
}
_COSINE = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}


def build(folder: Path) -> None:
    """Stage I, of 16 pixels a side instead of 64."""
    unet = _unet(
        sample_size=16,
        in_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    _write(folder, unet, sample_max_value=1.5)
    write_index(folder, "IFPipeline", _PARTS, requires_safety_checker=True)


def build_super_resolution(folder: Path) -> None:
    """Stage II, of 64 pixels a side instead of 256."""
    unet = _unet(
        sample_size=64,
        in_channels=6,
        layers_per_block=(1, 1, 2),
        block_out_channels=(4, 8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        class_embed_type="timestep",
        mid_block_scale_factor=2**0.5,
        only_cross_attention=True,
        resnet_out_scale_factor=2**0.5,
        resnet_skip_time_act=True,
        time_embedding_act_fn="gelu",
        time_embedding_dim=16,
    )
    _write(folder, unet, sample_max_value=1.0, image_noising_scheduler=DDPMScheduler(**_COSINE))
    parts = _PARTS | {"image_noising_scheduler": "diffusers.DDPMScheduler"}
    write_index(folder, "IFSuperResolutionPipeline", parts, requires_safety_checker=True)


def _write(folder: Path, unet: Any, *, sample_max_value: float, **further: Any) -> None:
    ids = write_t5_tokenizer(folder / "tokenizer", fast=False)
    scheduler = DDPMScheduler(
        **_COSINE,
        prediction_type="epsilon",
        variance_type="learned_range",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=sample_max_value,
    )
    save(folder, unet=unet, text_encoder=t5_encoder(48, ids), scheduler=scheduler, **further)


def _unet(**settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        out_channels=6,  # noise and variance
        act_fn="gelu",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        attention_head_dim=4,
        cross_attention_dim=32,
        cross_attention_norm="group_norm",
        encoder_hid_dim=48,  # the width of T5
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        **settings,
    )
