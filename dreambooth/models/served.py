"""What the model that MLflow serves is told of its pipeline, as it can't ask this project.

Plain facts, as values of JSON: `pipelines/tracking/served_model.py` loads, samples and decodes by these alone.
"""

from typing import Any

from dreambooth.errors import InputError
from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.cascade import SUPER_RESOLUTION
from dreambooth.models.families.schedulers import sampler_settings


def served_facts(
    base: BaseSettings,
    second: BaseSettings | None = None,
    *,
    resolution: int | None = None,
    noise_levels: int | None = None,
) -> dict[str, Any]:
    """The facts of models that are tuned from a base, with those of a second stage under its name.

    `resolution` in pixels is that of training, `noise_levels` are those that the second stage was tuned on; None: those
    of the bases.
    """
    facts = _of_stage(base) if resolution is None else _of_stage(base) | {"side": resolution}
    return facts if second is None else facts | {SUPER_RESOLUTION: _of_stage(second, noise_levels)}


def _of_stage(base: BaseSettings, noise_levels: int | None = None) -> dict[str, Any]:
    """`side` is None for a base that names no square; `decode` is None where a pipeline gives pixels in [-1, 1]."""
    family = base.family
    try:
        side = base.resolution
    except InputError:
        side = None
    decode = None
    for vae in family.role("vae"):
        decode = {
            "vae": vae.folder,
            "scaling_factor": base["vae.scaling_factor"],
            "shift_factor": base["vae.shift_factor"] or 0.0,
            "downscaling": family.downscaling(base),
            "packed": family.packed,
        }
    return {
        "denoiser": family.denoiser.folder,
        "loaded_with": dict(family.loaded_with),
        "sampler": family.sampler,
        "sampler_settings": sampler_settings(base.directory),
        "called_with": family.served_call(base, noise_levels),
        "output_type": family.output_type,
        "decode": decode,
        "side": side,
        "scales_up": family.scales_up,
    }
