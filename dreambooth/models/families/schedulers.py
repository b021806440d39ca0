"""Schedulers of base models: the noise process each belongs to, and the sampler of rectified flow."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.errors import InputError
from dreambooth.models.config_fields import read_json

if TYPE_CHECKING:
    from dreambooth.models.base_settings import BaseSettings

SAMPLER_NAMES = {
    "DPMSolverMultistepScheduler": "dpm-solver++",  # arXiv 2211.01095
    "FlowMatchEulerDiscreteScheduler": "flow-matching euler",
}
"""Names by class. A key of stored pictures holds it: another name would have them all sampled again."""

_FILE = "scheduler/scheduler_config.json"


def check_scheduler(settings: "BaseSettings") -> None:
    """Refuse a scheduler of another process than the family's: its betas, or sigmas, would be the library's defaults.

    Raises InputError naming the class, or a field of early versions of diffusers that later ones pass over.
    """
    path, process = settings.directory / _FILE, settings.family.noise
    config = read_json(path)
    if config.get("predict_epsilon") is False and config.get("prediction_type") != "sample":
        raise InputError(
            f"{path}: predict_epsilon is false, which diffusers passes over since it has prediction_type, so the model "
            f'would be trained to predict noise; write prediction_type "sample" instead'
        )
    name = str(config.get("_class_name", ""))
    found = "rectified flow" if name.startswith("FlowMatch") else "EDM" if name.startswith("EDM") else "diffusion"
    if name and found != process:
        raise InputError(
            f"{path} is that of a {name}, of {found}; expected a scheduler of {process}, which the "
            f"{settings.family.pipeline_class} was trained with. Is it the file that came with the base model?"
        )


_LEAST_LAMBDA = -5.1
"""Half the log-SNR where sampling of a cosine schedule starts: nearer to its pure noise, rounding would rule."""


def sampler_settings(directory: Path) -> dict[str, Any]:
    """Settings of a sampler that a base's schedule asks for, besides those in its file."""
    cosine = read_json(directory / _FILE).get("beta_schedule") == "squaredcos_cap_v2"
    return {"lambda_min_clipped": _LEAST_LAMBDA} if cosine else {}


def flow_scheduler(directory: Path) -> Any:
    """Euler's method with a base's schedule of sigmas."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_pretrained(directory, subfolder="scheduler", local_files_only=True)
