"""The published model that a single file of weights descends from, told by names and shapes in the file's header.

Its repository has the configurations and vocabularies that the file lacks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dreambooth.models.families import original_names as original

FILES = "Stable Diffusion 1, 2 or XL"
"""Models whose files are told apart."""
_CONV_IN = f"{original.DENOISER}input_blocks.0.0.weight"
_LATENT_CHANNELS = 4
_V1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_V2 = {
    "stabilityai/stable-diffusion-2-1": "predicts velocity, 768 pixels",
    "stabilityai/stable-diffusion-2-1-base": "predicts noise, 512 pixels",
}
_XL = "stabilityai/stable-diffusion-xl-base-1.0"
_NOT_XL = ("v_pred", "edm_mean", "edm_vpred.sigma_max")
"""Tensors by which files of XL's architecture say that their noise or prediction isn't XL's; ComfyUI reads them."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a file is in words, and the hub ids of its configurations with what tells them apart.

    There are several where the header doesn't tell, and none where no usual repository fits.
    """

    name: str
    choices: Mapping[str, str] = field(default_factory=dict)


def origin_of(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> Origin:
    """The origin of a file with tensors of these names and shapes, and these metadata (Stability's ModelSpec)."""
    channels = shapes[_CONV_IN][1] if _CONV_IN in shapes else None
    prediction = metadata.get("modelspec.prediction_type", "").lower()
    if channels is None:
        return Origin(name=f"no checkpoint of {FILES}, as it lacks {_CONV_IN}")
    if channels != _LATENT_CHANNELS:
        return Origin(name=f"a model whose denoiser takes {channels} channels, as those for inpainting do")
    if _holds(shapes, original.OPEN_CLIP_XL):
        other = [name for name in _NOT_XL if name in shapes] + ["modelspec.prediction_type"] * (prediction == "v")
        if other:
            return Origin(
                name=f"of Stable Diffusion XL's architecture, but doesn't predict noise as XL does ({other[0]})"
            )
        return Origin(name="Stable Diffusion XL", choices={_XL: ""})
    if _holds(shapes, original.OPEN_CLIP):
        wanted = {"v": "velocity", "epsilon": "noise"}.get(prediction, "")
        return Origin(name="Stable Diffusion 2", choices={hub_id: how for hub_id, how in _V2.items() if wanted in how})
    if _holds(shapes, original.CLIP):
        if prediction == "v":
            return Origin(name="of Stable Diffusion 1's architecture, but predicts velocity")
        return Origin(name="Stable Diffusion 1", choices={_V1: ""})
    return Origin(name=f"a checkpoint without the text encoders of {FILES}")


def _holds(shapes: Mapping[str, Sequence[int]], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in shapes)
