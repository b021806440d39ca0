"""Measurements that say what they were measured on: every figure has the stamp of the moment its measuring began.

A file of output/bench/ is a mapping of names to figures, with `stamps`: the stamp of each by its name.
"""

import datetime
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

Stamp = dict[str, str]
Figures = dict[str, Any]
VERSIONS = ("torch", "ray", "deepspeed", "diffusers")


def stamp() -> Stamp:
    """The day, the code and the machine, now: take it before what is measured begins."""
    # Elsewhere: describing PyTorch imports it, and memory of this process may be what is measured.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as elsewhere:
        return elsewhere.submit(_stamp).result()


def _stamp() -> Stamp:
    from pipelines.plan.here import describe_here

    return {"day": datetime.datetime.now(datetime.UTC).date().isoformat(), **describe_here()}


def stamped(figures: Mapping[str, Any], at: Stamp) -> Figures:
    """Figures, all measured from this stamp on."""
    return {"stamps": dict.fromkeys(figures, at), **figures}


def together(*measured: Mapping[str, Any]) -> Figures:
    """Figures of several measurements, each with its own stamp; the last of equal names counts."""
    stamps = {name: at for one in measured for name, at in one["stamps"].items()}
    return {"stamps": stamps, **{name: one[name] for one in measured for name in one["stamps"]}}


def alike(first: Stamp, second: Stamp) -> bool:
    """Whether figures of the two may be divided: by the same code with the same libraries on the same machine."""
    return {**first, "day": ""} == {**second, "day": ""}
