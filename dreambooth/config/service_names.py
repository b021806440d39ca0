"""Check names for MLflow's registry, its addresses (`models:/NAME@ALIAS`) and its databases.

>>> model_name_fault("dreambooth-rex") is None
True
>>> model_name_fault("a:b")
"expected a name without / : @ % # \\\\ * ? [ ] ' and quotes, got ':' in 'a:b'"
"""

import re
from typing import Annotated

from pydantic import AfterValidator

_UNFIT_FOR_MODELS = re.compile(r"""[/:@%#\\*?\[\]'"`]""")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LONGEST_MODEL, _LONGEST_EXPERIMENT = 200, 250
"""Longest name in bytes; MLflow's tables have room for 256, and names derived from a model's are longer."""


def model_name_fault(name: str, *, pattern: bool = False) -> str | None:
    """The fault of a registered model's name, or None; a `pattern` may hold `*`, `?` and `[…]`."""
    unfit = _UNFIT_FOR_MODELS.search(re.sub(r"[*?\[\]]", "", name) if pattern else name)
    if unfit is not None:
        return f"expected a name without / : @ % # \\ * ? [ ] ' and quotes, got {unfit[0]!r} in {name!r}"
    return _fault(name, _LONGEST_MODEL)


def _fault(name: str, longest: int) -> str | None:
    if not name or name != name.strip() or _CONTROL.search(name):
        return f"expected a name without spaces around it and without control characters, got {name!r}"
    if (size := len(name.encode("utf-8", "replace"))) > longest:
        return f"expected a name of at most {longest} bytes, got {size}: {name[:20]!r}…"
    return None


def _check_model(name: str) -> str:
    if (fault := model_name_fault(name)) is not None:
        raise ValueError(fault)
    return name


def _check_experiment(name: str) -> str:
    if (fault := _fault(name, _LONGEST_EXPERIMENT)) is not None:
        raise ValueError(fault)
    return name


ModelName = Annotated[str, AfterValidator(_check_model)]
ExperimentName = Annotated[str, AfterValidator(_check_experiment)]
