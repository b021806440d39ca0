"""The numbers that a setting takes, as types that check themselves."""

from typing import Annotated

from pydantic import BeforeValidator, Field


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"expected a whole number, got {value}")
    return value


Positive = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1)]
NotNegative = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0)]
Rate = Annotated[float, Field(gt=0, le=1)]
