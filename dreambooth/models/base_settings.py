"""Read the configuration files of a base model, checked and with defaults.

Missing fields have the defaults of the library's classes. Importing those would take seconds before a plan can be
shown, so the defaults are repeated here; a test compares them.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import InputError

PREDICTIONS = ("epsilon", "v_prediction")
_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field of a configuration file; `default` is the library's, `holds` checks a value."""

    file: str
    name: str
    default: Any
    expected: str
    holds: Callable[[Any], bool]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(holds(one) for one in value)


def _or_null(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _size(value: Any) -> bool:
    return _whole(value) or (_list_of(_whole)(value) and len(value) == 2)


_UNET, _VAE, _TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
_SCHEDULER, _TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
FILES = (_UNET, _TEXT, _VAE, _SCHEDULER, _TOKENIZER)

_NUMBER, _COUNT = "a number above 0", "a whole number above 0"
FIELDS = tuple(
    Field(file=file, name=name, default=default, expected=expected, holds=holds)
    for file, name, default, expected, holds in (
        (_UNET, "sample_size", None, "a whole number, two of them or null", _or_null(_size)),
        (_UNET, "in_channels", 4, _COUNT, _whole),
        (_UNET, "time_cond_proj_dim", None, f"null or {_COUNT}", _or_null(_whole)),
        (_VAE, "block_out_channels", (64,), "a list of whole numbers", _list_of(_whole)),
        (_VAE, "latent_channels", 4, _COUNT, _whole),
        (_VAE, "scaling_factor", 0.18215, _NUMBER, _positive),
        (_VAE, "shift_factor", None, "null or a number", _or_null(_number)),
        (_TEXT, "hidden_size", 512, _COUNT, _whole),
        (_TEXT, "max_position_embeddings", 77, _COUNT, _whole),
        (_SCHEDULER, "prediction_type", "epsilon", " or ".join(PREDICTIONS), lambda value: value in PREDICTIONS),
        (_SCHEDULER, "num_train_timesteps", 1000, _COUNT, _whole),
        (_SCHEDULER, "beta_start", 0.0001, _NUMBER, _positive),
        (_SCHEDULER, "beta_end", 0.02, _NUMBER, _positive),
        (_SCHEDULER, "beta_schedule", "linear", f"one of {', '.join(_SCHEDULES)}", lambda value: value in _SCHEDULES),
        (_SCHEDULER, "trained_betas", None, "null or a list of numbers", _or_null(_list_of(_number))),
        (_SCHEDULER, "rescale_betas_zero_snr", False, "true or false", lambda value: isinstance(value, bool)),
        (_TOKENIZER, "model_max_length", None, f"null or {_NUMBER}", _or_null(_positive)),
    )
)


class BaseSettings:
    """The settings of the base model in a directory; `settings["unet.in_channels"]`."""

    def __init__(self, directory: Path) -> None:
        """Read its files. Raises InputError naming the file and field for an invalid one."""
        self._directory = directory
        read = {file: read_json(directory / file) for file in FILES}
        self._values = {f"{one.file.partition('/')[0]}.{one.name}": _value(read, one, directory) for one in FIELDS}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    @property
    def downscaling(self) -> int:
        """Pixels per latent position along a side: the VAE halves between its blocks."""
        return int(2 ** (len(self["vae.block_out_channels"]) - 1))

    @property
    def resolution(self) -> int:
        """Side in pixels of the UNet's training images. Raises InputError if its configuration has none."""
        size = self["unet.sample_size"]
        sides = set(size) if isinstance(size, list) else {size}
        if None in sides or len(sides) > 1:
            raise InputError(
                f"{self._directory / _UNET}: sample_size is {json.dumps(size)}, which names no square that the model "
                f"was trained at; give it yourself: images.resolution for training, --height and --width for samples"
            )
        return int(sides.pop()) * self.downscaling

    @property
    def num_train_timesteps(self) -> int:
        """How many timesteps its noise schedule has."""
        return len(self["scheduler.trained_betas"] or ()) or int(self["scheduler.num_train_timesteps"])

    @property
    def schedule_warning(self) -> str | None:
        """A warning about a noise schedule whose last timestep can't be learnt, or None."""
        if not self["scheduler.rescale_betas_zero_snr"] or self["scheduler.prediction_type"] != "epsilon":
            return None
        return (
            "the base model's schedule ends in pure noise (rescale_betas_zero_snr), and it predicts noise, which says "
            "nothing of the picture there (arXiv 2305.08891, section 3.2); if it was trained for velocity, its "
            "scheduler_config.json should say prediction_type v_prediction, else rescale_betas_zero_snr false"
        )

    def check_trainable(self) -> None:
        """Raise InputError for a UNet with inputs besides noisy latents, timestep and text."""
        if self["unet.in_channels"] != self["vae.latent_channels"]:
            raise InputError(
                f"{self._directory / _UNET}: in_channels is {self['unet.in_channels']}, but latent_channels of "
                f"the VAE is {self['vae.latent_channels']}; expected a base model that takes noisy latents alone (one "
                f"for inpainting takes more)"
            )
        if self["unet.time_cond_proj_dim"] is not None:
            raise InputError(
                f"{self._directory / _UNET}: time_cond_proj_dim is {self['unet.time_cond_proj_dim']}, so the UNet is "
                f"distilled and takes the guidance scale as an input, which it is not trained with here; give the "
                f"model that it was distilled from"
            )


def _value(read: dict[str, dict[str, Any]], field: Field, directory: Path) -> Any:
    value = read[field.file].get(field.name, field.default)
    if field.name in read[field.file] and not field.holds(value):
        raise InputError(
            f"{directory / field.file}: {field.name} is {json.dumps(value)}; expected {field.expected}. Is it the file "
            f"that came with the base model?"
        )
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of settings. Raises InputError if it is missing or invalid."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"there is no {path}; is the copy complete?") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}; copy it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: expected settings, got {type(content).__name__}; copy it again")
    return content
