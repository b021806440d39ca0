"""Bounded number types for settings.

Values far out of range are typos or wrong units, and refused: a batch of a million, a learning rate of 50, a seed too
large for any generator.
"""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from dreambooth.config.explain import in_yaml
from dreambooth.config.limits import (
    LARGEST_SEED,
    LARGEST_SIDE,
    MOST_GUIDANCE,
    MOST_SAMPLING_STEPS,
    MOST_STEPS,
    SMALLEST_SIDE,
)


def _number(value: object) -> object:
    """Refuse true and false, which pydantic takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {in_yaml(value)}")
    return value


def _whole(value: object) -> object:
    """Read 1e3, which isn't a whole number to pydantic; refuse true and false."""
    if isinstance(value, bool):
        raise ValueError(f"expected a whole number, got {in_yaml(value)}")
    if isinstance(value, str) and "e" in value.lower():
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if math.isfinite(number) and number.is_integer() else value
    return value


def _side(resolution: int) -> int:
    if resolution < SMALLEST_SIDE or resolution % 8:
        raise ValueError(f"expected a multiple of 8, at least {SMALLEST_SIDE}, got {resolution}")
    if resolution > LARGEST_SIDE:
        raise ValueError(f"expected at most {LARGEST_SIDE}, got {resolution}")
    return resolution


Steps = Annotated[int, Field(ge=1, le=MOST_STEPS), BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=1, le=10_000), BeforeValidator(_whole)]
Repeats = Annotated[int, Field(ge=1, le=1000), BeforeValidator(_whole)]
Retries = Annotated[int, Field(ge=0, le=1000), BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED), BeforeValidator(_whole)]
NoiseLevels = Annotated[int, Field(ge=1, le=1000), BeforeValidator(_whole)]
Pixels = Annotated[int, Field(ge=1, le=LARGEST_SIDE), BeforeValidator(_whole)]
SamplingSteps = Annotated[int, Field(ge=1, le=MOST_SAMPLING_STEPS), BeforeValidator(_whole)]
Guidance = Annotated[float, Field(ge=1, le=MOST_GUIDANCE), BeforeValidator(_number)]
Rate = Annotated[float, Field(gt=0, le=1), BeforeValidator(_number)]
Decay = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]
Fraction = Annotated[float, Field(gt=0, lt=1), BeforeValidator(_number)]
Gamma = Annotated[float, Field(gt=0, le=1000), BeforeValidator(_number)]
Share = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]
Minutes = Annotated[float, Field(gt=0, le=10_080), BeforeValidator(_number)]
GradNorm = Annotated[float, Field(gt=0, le=1e9), BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]
"""A number with bounds of the setting's own."""
Whole = Annotated[int, BeforeValidator(_whole)]
"""A whole number with bounds of the setting's own."""
Resolution = Annotated[
    int,
    Field(json_schema_extra={"minimum": SMALLEST_SIDE, "maximum": LARGEST_SIDE}),
    AfterValidator(_side),
    BeforeValidator(_whole),
]
Graph = Literal["auto", "off"]
"""Whether CUDA graphs are used where they can be."""
