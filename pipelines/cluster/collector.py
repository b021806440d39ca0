"""Python's garbage collector, told that what libraries make at import is there to stay."""

import atexit
import gc

_NEW_OBJECTS = 50_000


def collect_less_garbage() -> None:
    """Call first in a process that imports torch, diffusers, Ray or MLflow.

    They make a million objects: to look through them over and over is a fifth of the time of their import, and to take
    them apart at the end of the process is two seconds more.
    """
    gc.set_threshold(_NEW_OBJECTS)
    atexit.register(gc.freeze)
