"""Requests and answers of `/generate`, and the validation of requests.

Requests are checked before they are queued: unambiguous JSON, known fields, finite numbers, a readable prompt.
"""

import difflib
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dreambooth.config.explain import as_given, plain_message
from dreambooth.config.wording import one_line
from dreambooth.errors import InputError

MOST_IMAGES = 8
MOST_BYTES = 16_384
"""Most bytes of a request's body: a prompt of 1000 characters, each written as \\uXXXX twice, and the rest."""

_MOST_SEED = 2**63 - MOST_IMAGES  # the last image's seed fits into 64 bits, too


class Asked(BaseModel):
    """A request; missing fields default to the model's own."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    subject: str = Field(min_length=1, max_length=256, description="name of the subject, as listed by /subjects")
    prompt: Annotated[str, AfterValidator(one_line)] = Field(
        max_length=1000, description="prompt, in which [V] stands for the subject's identifier"
    )
    num: int = Field(1, ge=1, le=MOST_IMAGES, description="number of images")
    seed: int = Field(0, ge=0, le=_MOST_SEED, description="seed of the first image; the next have the next seeds")
    num_inference_steps: int | None = Field(None, ge=1, le=200, description="denoising steps; more take longer")
    guidance_scale: float | None = Field(
        None, ge=1, le=50, description="weight of the prompt (classifier-free guidance); 1: none"
    )


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """PNG files, and warnings about their prompt."""

    images: tuple[bytes, ...]
    warnings: tuple[str, ...]


class Refused(Exception):
    """A refused request: the HTTP status and the reason in a sentence."""

    def __init__(self, status: int, reason: str) -> None:
        """Store the status and the reason."""
        super().__init__(status, reason)
        self.status, self.reason = status, reason


def read_request(body: bytes, content_type: str) -> Asked:
    """Parse a request. Raises InputError, with what was expected and what was got, for anything else."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise InputError(f"the content type is {_shown(content_type)}; expected application/json")
    fields = _read_object(body)
    if unknown := [name for name in fields if name not in Asked.model_fields]:
        raise InputError("; ".join(_about_unknown(name) for name in unknown[:3]))
    for name, value in fields.items():
        if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
            raise InputError(f"{name} holds half of a character (a lone surrogate); expected whole Unicode text")
    try:
        return Asked.model_validate(fields)
    except ValidationError as error:
        raise InputError("; ".join(_explain(dict(fault)) for fault in error.errors())) from None


def _read_object(body: bytes) -> dict[str, Any]:
    if len(body) > MOST_BYTES:
        raise InputError(f"the body has more than {MOST_BYTES} bytes; expected a JSON object with a short prompt")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the body is not UTF-8 text: byte {error.start} is 0x{body[error.start]:02x}") from None
    try:
        fields = json.loads(text, object_pairs_hook=_once_each, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise InputError(f"the body is not JSON: {str(error).partition(';')[0]}") from None
    if not isinstance(fields, dict):
        raise InputError(f"expected a JSON object such as {_EXAMPLE}, got {type(fields).__name__}")
    return fields


_EXAMPLE = '{"subject": "rex", "prompt": "a photo of [V] dog"}'


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{_shown(repeated)} is given twice; expected each field once")
    return dict(pairs)


def _no_number(constant: str) -> NoReturn:
    raise InputError(f"{constant} is no number that JSON knows; expected a finite one, or leave the field out")


def _about_unknown(name: str) -> str:
    known = list(Asked.model_fields)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [each for each in known if name in each]
    hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
    return f"unknown field {_shown(name)}; {hint}"


def _explain(fault: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return f"{where} is missing; expected a JSON object such as {_EXAMPLE}"
    got = "" if fault["type"] == "value_error" else f"; got {_shown(fault['input'])}"
    return f"{where}: {plain_message(fault['msg'])}{got}"


def _shown(value: Any) -> str:
    """A value for use in an answer: shortened, and in ASCII, so that it can always be encoded."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = as_given(value, ascii)
    return text if len(text) <= 60 else f"{text[:56]} ..."
