"""Defaults of the built-in base models, where they differ from those for Stable Diffusion."""

from collections.abc import Callable
from typing import Any

from dreambooth.config.overrides import merge
from dreambooth.config.train import RATES_OF_TEXT_ENCODER

_TRAIN = {
    "max_train_steps": 400,
    "micro_batch_size": 2,
    "learning_rate": 5e-4,
    "text_encoder_learning_rate": 6e-4,
    "identifier_learning_rate": 8e-3,
    "lr_scheduler": "linear",
    "checkpoint_every": 100,
}
_PROMPTS = [
    "a photo of [V] {class_noun}",
    "a photo of [V] {class_noun} on the beach",
    "a photo of [V] {class_noun} in the snow",
    "a photo of [V] {class_noun} in the forest",
    "a photo of [V] {class_noun} on the grass",
]
_GATE = {"pres_limit": 0.4}

MINIATURES: dict[str, dict[str, dict[str, Any]]] = {
    "miniature": {
        "prior": {"num_class_images": 100, "num_inference_steps": 12, "guidance_scale": 4.0},
        "train": _TRAIN | {"min_snr_gamma": 5.0},
        "evaluation": {"prompts": _PROMPTS, "num_inference_steps": 12, "guidance_scale": 4.0},
        "gate": _GATE,
    },
    "miniature-flow": {
        "prior": {"num_class_images": 48, "num_inference_steps": 16, "guidance_scale": 4.0},
        "train": _TRAIN | {"max_train_steps": 200},
        "evaluation": {"prompts": _PROMPTS, "num_inference_steps": 16, "guidance_scale": 4.0},
        "gate": _GATE,
    },
    "miniature-cascade": {
        "prior": {"num_class_images": 48, "num_inference_steps": 12, "guidance_scale": 3.0},
        "train": _TRAIN | {"max_train_steps": 200, "text_encoders": "all", "identifier_learning_rate": 2e-2},
        "evaluation": {"prompts": _PROMPTS, "num_inference_steps": 12, "guidance_scale": 3.0},
        "gate": _GATE,
        "super_resolution": {"base_model": "miniature-cascade", "max_train_steps": 150, "learning_rate": 5e-4},
    },
}
"""Settings by `base_model`; a user's own settings override them."""


def with_miniature_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings over those of their base model in MINIATURES, without those of a text encoder that stays frozen.

    A user's own rates for it are refused.
    """
    base = settings.get("base_model", "miniature")
    defaults = MINIATURES.get(base) if isinstance(base, str) else None
    if defaults is None:
        return settings
    frozen = str(setting_of(settings, "train", "train_text_encoder")).lower() in ("false", "no", "off", "0", "n", "f")
    if not frozen and setting_of(settings, "train", "text_encoders") != "none":
        return merge(defaults, settings)
    without = (*RATES_OF_TEXT_ENCODER, "text_encoders")
    train = {name: value for name, value in defaults["train"].items() if name not in without}
    return merge(defaults | {"train": train}, settings)


def other_defaults(name: str, default: Any, shown: Callable[[Any], str]) -> dict[str, list[str]]:
    """Defaults of a setting, by its dotted name, that are shown differently, with the models that have them."""
    group, _, key = name.partition(".")
    bases: dict[str, list[str]] = {}
    for base, groups in MINIATURES.items():
        value = shown(groups.get(group, {}).get(key, default))
        if value != shown(default):
            bases.setdefault(value, []).append(base)
    return bases


def setting_of(settings: dict[str, Any], group: str, name: str) -> Any:
    """A setting of a group as it was given, or None."""
    values = settings.get(group)
    return values.get(name) if isinstance(values, dict) else None
