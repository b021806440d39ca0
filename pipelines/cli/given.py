"""Validate command-line input: bounded numbers, and text that can be encoded."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dreambooth.config.text_files import utf8_fault
from dreambooth.errors import InputError

_VARIABLES = ("AWS_", "DREAMBOOTH_", "HF_", "MLFLOW_", "RAY_", "HOME", "TMPDIR")
"""Prefixes of environment variables in use."""


class Real(click.FloatRange):
    """A range of numbers without nan."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse a number. Raises click's error for one out of range."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is no number.", param, ctx)
        return number


def check_text(arguments: Sequence[str]) -> None:
    """Raise InputError for non-UTF-8 bytes in an argument, a variable or the working folder's name.

    File systems allow such names; manifests, databases and pages can't store them.
    """
    for place, argument in enumerate(arguments, start=1):
        if (fault := utf8_fault(argument)) is not None:
            raise InputError(f"argument {place}, {fault}; write it as UTF-8, or rename the file that it means")
    for name, value in os.environ.items():
        if name.startswith(_VARIABLES) and (fault := utf8_fault(value)) is not None:
            raise InputError(f"the variable {name} is {fault}; set it again")
    if (fault := utf8_fault(str(Path.cwd()))) is not None:
        raise InputError(f"the working folder {fault}; rename it, or work in another one")
