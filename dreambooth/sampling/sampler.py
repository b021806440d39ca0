"""Load a pipeline and sample from it: for class images, validation samples and evaluation alike.

One generator per image seed, so an image does not depend on how the work was split between processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from dreambooth.config.limits import SAMPLED_TOGETHER
from dreambooth.models.cascade import SUPER_RESOLUTION
from dreambooth.models.export import put_weights
from dreambooth.models.families import Family, family_of, family_of_pipeline
from dreambooth.quiet import hide_progress_bars, quiet
from dreambooth.randomness import generator
from dreambooth.sampling.behind import behind
from dreambooth.sampling.best_dtype import best_dtype
from dreambooth.sampling.graphs import Graphs
from dreambooth.sampling.pictures import Pictures

T = TypeVar("T")


def sampling_dtype(device: str) -> torch.dtype:
    """The best dtype of denoiser and text encoder on a device: half precision where it has it, else fp32.

    On a CPU that is bf16 under autocast, with weights and the sampler's arithmetic in fp32: twice as fast where the CPU
    multiplies bf16 itself, slower where it is emulated. Pictures stored by their dtype are sampled in that dtype
    (`sample`) on every device.
    """
    dtype: torch.dtype = getattr(torch, best_dtype(device))
    return dtype


def weights_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights for sampling in `dtype`: fp16 on a GPU, else fp32, with autocast if `dtype` is lower."""
    return torch.float16 if device.startswith("cuda") and dtype is torch.float16 else torch.float32


def load_pipeline(
    directory: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    super_resolution: Path | None = None,
    noise_levels: int | None = None,
    alone: bool = False,
    only_second: bool = False,
) -> Any:
    """Load a diffusers directory with its family's sampler, its weights in `dtype`, without progress bars.

    Components that sampling doesn't use (a safety checker) may be missing. The VAE stays in fp32 whatever `dtype` is:
    some overflow in fp16, which gives black pictures. The second stage of a cascade, the directory `super_resolution`
    or a published model's folder of that name, becomes the pipeline's attribute of that name, with the first one's text
    encoder instead of its own: both were trained with the same. With `noise_levels` it samples as if it had been tuned
    on so many levels of noise. With `alone` such a folder, which a base model may have, is passed over. With
    `only_second` the first stage's denoiser is left out: such a pipeline scales up given `images` (`sample`).
    """
    quiet()
    hide_progress_bars()
    family = family_of(directory)
    modules = _trained_parts(family, directory, device, dtype, denoiser=not only_second) | {
        part.folder: family.load_vae(directory, device) for part in family.role("vae")
    }
    pipeline = _assembled(family, directory, modules)
    second = super_resolution or (None if alone else directory / SUPER_RESOLUTION)
    return pipeline if second is None else _with_second_stage(pipeline, second, device, dtype, noise_levels)


def load_trained(base: Path, state: Mapping[str, Tensor], *, device: str, dtype: torch.dtype) -> Any:
    """A pipeline with trained weights from memory."""
    pipeline = load_pipeline(base, device=device, dtype=dtype, alone=True)
    put_weights(pipeline, state)
    return pipeline


def personalized(base: Any, directory: Path) -> Any:
    """A pipeline with denoiser and text encoders of a fine-tuned one in `directory`, and the VAE shared with `base`.

    What has a state or settings of its own (scheduler, tokenizers) is never shared.
    """
    family = family_of(directory)
    device, dtype = str(base.device), denoiser_of(base).dtype
    shared = {part.folder: getattr(base, part.folder) for part in family.role("vae")}
    pipeline = _assembled(family, directory, _trained_parts(family, directory, device, dtype) | shared)
    return _with_second_stage(pipeline, directory / SUPER_RESOLUTION, device, dtype)


def _with_second_stage(
    pipeline: Any, directory: Path, device: str, dtype: torch.dtype, noise_levels: int | None = None
) -> Any:
    """A pipeline with the second stage in a directory, if there is any."""
    if directory.is_dir():
        family = family_of(directory, whole=False)
        denoiser = family.load(directory, family.denoiser.folder, dtype).to(device).eval()
        modules = {family.denoiser.folder: denoiser, "text_encoder": pipeline.text_encoder}
        pipeline.super_resolution = _assembled(family, directory, modules)
        if noise_levels is not None:
            family.sample_noise_levels(pipeline.super_resolution, noise_levels)
    return pipeline


def denoiser_of(pipeline: Any) -> Any:
    """A pipeline's denoiser."""
    return getattr(pipeline, family_of_pipeline(pipeline).denoiser.folder)


def _trained_parts(
    family: Family, directory: Path, device: str, dtype: torch.dtype, *, denoiser: bool = True
) -> dict[str, Any]:
    """Modules by folder; None in the denoiser's place without one."""
    parts = (*([family.denoiser] if denoiser else []), *family.text_encoders(directory))
    none: dict[str, Any] = {family.denoiser.folder: None}
    return none | {part.folder: family.load(directory, part.folder, dtype).to(device).eval() for part in parts}


def _assembled(family: Family, directory: Path, modules: Mapping[str, Any]) -> Any:
    pipeline = family.pipeline(directory, modules)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = SAMPLED_TOGETHER,
    dtype: torch.dtype | None = None,
    images: Sequence[Image.Image] | None = None,
    graphs: Graphs | None = None,
) -> list[Image.Image]:
    """Sample one image per (prompt, seed) pair, in order; `images`, one a pair, are those that a stage scales up.

    Given to a cascade they take the place of its first stage's pictures, which isn't run then.

    `dtype` is that of denoiser and text encoders, emulated if necessary; None is the device's best. `height` and
    `width` in pixels, of the first stage, default to the training resolution; the second one of a pipeline that has it
    scales its pictures up, at the guidance scale that suits it. With `graphs` a GPU replays the steps of denoisers.

    Raises ValueError for different numbers of prompts and seeds, RuntimeError for pixels that are NaN.
    """
    return sample_each(
        _as_it_is,
        pipeline,
        prompts,
        seeds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        batch_size=batch_size,
        dtype=dtype,
        images=images,
        graphs=graphs,
    )


def sample_each(
    each: Callable[[Image.Image], T], pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], **settings: Any
) -> list[T]:
    """What `each` makes of every image of `sample`, in order; it is called in a thread while others are sampled."""
    batches = sampled(pipeline, prompts, seeds, **settings)
    calls = ([partial(_of_picture, each, batch, place) for place in range(len(batch))] for batch in batches)
    return [made for group in behind(calls, pipeline.device.type) for made in group]


def _as_it_is(image: Image.Image) -> Image.Image:
    return image


def _of_picture(each: Callable[[Image.Image], T], batch: Pictures, place: int) -> T:
    return each(batch[place])


def sampled(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = SAMPLED_TOGETHER,
    dtype: torch.dtype | None = None,
    images: Sequence[Image.Image] | None = None,
    graphs: Graphs | None = None,
    smaller: bool = True,
) -> Iterator[Pictures]:
    """The batches of `sample`, each as soon as it is decoded, or a GPU has been asked to: see `Pictures`.

    Where one doesn't fit a GPU's memory, it and those after it are made half as large; unless `smaller` is false.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"expected one seed per prompt, got {len(seeds)} seeds for {len(prompts)} prompts")
    large = getattr(pipeline, SUPER_RESOLUTION, None)
    if dtype is None:
        dtype = sampling_dtype("cpu") if pipeline.device.type == "cpu" else denoiser_of(large or pipeline).dtype
    batches = partial(
        _batches,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        dtype=dtype,
        graphs=graphs,
        smaller=smaller,
    )
    first = batches(pipeline, prompts, seeds, guidance_scale=guidance_scale, height=height, width=width, images=images)
    if large is None:
        yield from first
        return
    small = [picture for pictures in first for picture in pictures] if images is None else list(images)
    if not small:
        return
    family, (width, height) = family_of_pipeline(large), small[0].size
    yield from batches(
        large,
        prompts,
        [further_seed(seed) for seed in seeds],
        guidance_scale=family.guidance_scale(denoiser_of(large).config),
        height=family.scales_up * height,
        width=family.scales_up * width,
        images=small,
    )


def _batches(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    height: int | None,
    width: int | None,
    batch_size: int,
    dtype: torch.dtype,
    images: Sequence[Image.Image] | None,
    graphs: Graphs | None,
    smaller: bool,
) -> Iterator[Pictures]:
    """Batches of one stage."""
    family = family_of_pipeline(pipeline)
    denoiser = denoiser_of(pipeline)
    guided = family.guided(pipeline, guidance_scale)
    _lay_out(denoiser, dtype)
    lower = dtype is not denoiser.dtype
    computing = torch.autocast(pipeline.device.type, dtype, enabled=lower, cache_enabled=graphs is None)
    faster = partial(family.computed_once if graphs is None else partial(graphs.replaying, family), guided=guided)
    with computing, torch.no_grad():
        text = family.prompt_arguments(pipeline, prompts, guided=guided)
    start, size = 0, batch_size
    while start < len(prompts):
        batch = slice(start, start + size)
        # Noise comes from CPU generators on every device: the same seed is the same picture on a laptop and a GPU.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[batch]]
        pictures = None
        try:
            with computing, faster(denoiser):
                x0 = pipeline(
                    **{name: part[batch] for name, part in text.items()},
                    **family.call_arguments(guidance_scale),
                    **({} if images is None else family.image_arguments(pipeline, images[batch])),
                    generator=generators,
                    num_inference_steps=num_inference_steps,
                    height=height,
                    width=width,
                    output_type=family.output_type,
                ).images
            pictures = _decode(family, pipeline, x0, height, width)
        except torch.OutOfMemoryError:
            if not smaller or size == 1:
                raise
        if pictures is None:  # out of the handler, which holds the tensors of what failed
            size = (size + 1) // 2
            if graphs is not None:
                graphs.forget()
            torch.cuda.empty_cache()
            continue
        yield pictures
        start += size


def further_seed(seed: int) -> int:
    """The second stage's seed: with the first one's its noise would begin with the same numbers."""
    return generator(seed, SUPER_RESOLUTION).initial_seed()


def _lay_out(denoiser: torch.nn.Module, dtype: torch.dtype) -> None:
    """Choose the memory format on a CPU: channels last is a tenth faster in fp32, and slower in bf16."""
    layout = torch.channels_last if dtype is torch.float32 else torch.contiguous_format
    weight = next((weight for weight in denoiser.parameters() if weight.ndim == 4), None)
    if weight is not None and weight.device.type == "cpu" and not weight.is_contiguous(memory_format=layout):
        denoiser.to(memory_format=layout)  # type: ignore[call-overload]


@torch.no_grad()
def _decode(family: Family, pipeline: Any, x0: Tensor, height: int | None = None, width: int | None = None) -> Pictures:
    """Pictures of a pipeline's output."""
    return Pictures(family.decode(pipeline, x0, height=height, width=width))
