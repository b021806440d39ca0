"""Load a pipeline and sample from it: for class images, validation samples and evaluation alike.

One generator per image seed, so an image does not depend on how the work was split between processes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from dreambooth.models.export import put_weights
from dreambooth.models.families import family_of
from dreambooth.models.families.stable_diffusion import read_tokenizer
from dreambooth.quiet import hide_progress_bars, quiet
from dreambooth.sampling.computed_once import computed_once

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def sampling_dtype(device: str) -> torch.dtype:
    """The best dtype of denoiser and text encoder on a device: half precision where it has it, else fp32.

    On a CPU that is bf16 under autocast, with weights and the sampler's arithmetic in fp32: twice as fast where the CPU
    multiplies bf16 itself, slower where it is emulated. Pictures stored by their dtype are sampled in that dtype
    (`sample`) on every device.
    """
    if device.startswith("cuda"):
        return torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def weights_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights for sampling in `dtype`: fp16 on a GPU, else fp32, with autocast if `dtype` is lower."""
    return torch.float16 if device.startswith("cuda") and dtype is torch.float16 else torch.float32


def load_pipeline(
    directory: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> "StableDiffusionPipeline":
    """Load a diffusers directory, its weights in `dtype`, for sampling with DPM-Solver++ and without progress bars.

    Components that sampling doesn't use (a safety checker) may be missing. The VAE
    stays in fp32 whatever `dtype` is: some overflow in fp16, which gives black pictures.
    """
    quiet()
    hide_progress_bars()
    from diffusers import DPMSolverMultistepScheduler as Sampler
    from diffusers import StableDiffusionPipeline

    from dreambooth.models.vae import load_vae

    family = family_of(directory)
    pipeline = StableDiffusionPipeline(
        unet=family.load_denoiser(directory, dtype),
        text_encoder=family.load_text_encoder(directory, dtype),
        vae=load_vae(directory, device),
        tokenizer=read_tokenizer(directory),
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device)
    pipeline.scheduler = Sampler.from_config(
        Sampler.load_config(directory, subfolder="scheduler", local_files_only=True)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_trained(
    base: Path, state: Mapping[str, Tensor], *, device: str, dtype: torch.dtype
) -> "StableDiffusionPipeline":
    """A pipeline with trained weights from memory."""
    pipeline = load_pipeline(base, device=device, dtype=dtype)
    put_weights(pipeline, state)
    return pipeline


def personalized(base: "StableDiffusionPipeline", directory: Path) -> "StableDiffusionPipeline":
    """A pipeline with denoiser and text encoder of a fine-tuned one in `directory`, and all else shared with `base`.

    Except the scheduler, which holds the state of one sampling.
    """
    from diffusers import StableDiffusionPipeline

    family = family_of(directory)
    own = {
        "unet": family.load_denoiser(directory, base.unet.dtype).to(base.device),
        "text_encoder": family.load_text_encoder(directory, base.unet.dtype).to(base.device),
        "scheduler": None,  # a pipeline changes the settings of one that it is made with
    }
    pipeline = StableDiffusionPipeline(**{**base.components, **own}, requires_safety_checker=False)
    pipeline.scheduler = type(base.scheduler).from_config(base.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: "StableDiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
) -> list[Image.Image]:
    """Sample one image per (prompt, seed) pair, in order.

    `dtype` is that of denoiser and text encoder, emulated if necessary; None is the device's best. `height` and `width`
    in pixels default to the training resolution.

    Raises ValueError for different numbers of prompts and seeds, RuntimeError for pixels that are NaN.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"expected one seed per prompt, got {len(seeds)} seeds for {len(prompts)} prompts")
    if dtype is None:
        dtype = sampling_dtype("cpu") if pipeline.device.type == "cpu" else pipeline.unet.dtype
    # A distilled UNet takes the scale as an input instead, and is asked once a step.
    guided = guidance_scale > 1 and pipeline.unet.config.time_cond_proj_dim is None
    _lay_out(pipeline.unet, dtype)
    computing = torch.autocast(pipeline.device.type, dtype, enabled=dtype is not pipeline.unet.dtype)
    images: list[Image.Image] = []
    with computing:
        texts, nothing = _encode(pipeline, prompts)
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        # Noise comes from CPU generators on every device: the same seed is the same picture on a laptop and a GPU.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[batch]]
        with computing, computed_once(pipeline.unet, guided=guided):
            latents = pipeline(
                prompt_embeds=texts[batch],
                negative_prompt_embeds=nothing.expand_as(texts[batch]),
                generator=generators,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                output_type="latent",
            ).images
        images += _decode(pipeline, latents)
    return images


@torch.no_grad()
def _encode(pipeline: "StableDiffusionPipeline", prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings of the prompts (N, L, D) and of no prompt (1, L, D), each text encoded once."""
    places = {text: place for place, text in enumerate(dict.fromkeys([*prompts, ""]))}
    embeddings, _ = pipeline.encode_prompt(list(places), pipeline.device, 1, do_classifier_free_guidance=False)
    return embeddings[[places[prompt] for prompt in prompts]], embeddings[[places[""]]]


def _lay_out(unet: torch.nn.Module, dtype: torch.dtype) -> None:
    """Choose the memory format on a CPU: channels last is a tenth faster in fp32, and slower in bf16."""
    layout = torch.channels_last if dtype is torch.float32 else torch.contiguous_format
    weight = next(weight for weight in unet.parameters() if weight.ndim == 4)
    if weight.device.type == "cpu" and not weight.is_contiguous(memory_format=layout):
        unet.to(memory_format=layout)  # type: ignore[call-overload]


@torch.no_grad()
def _decode(pipeline: "StableDiffusionPipeline", latents: Tensor) -> list[Image.Image]:
    """Decode latents to pictures, inverting the scale and shift of `encode_latents`."""
    vae = pipeline.vae
    latents = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    pixels = vae.decode(latents).sample  # (N, 3, H, W) in [-1, 1]
    if not torch.isfinite(pixels).all():
        raise RuntimeError("the pictures are not numbers: the weights are damaged, or overflow in half precision")
    images: list[Image.Image] = pipeline.image_processor.postprocess(pixels)
    return images
