"""Plain diffusers beside the product: a base's own pipeline, and what its denoiser is called with."""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Call = dict[str, Any]


def plain_pipeline(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline as anyone loads it, with None for parts that its index names but that weren't downloaded.

    Stable Diffusion 3 without T5 has to be told so even if its index says it.
    """
    from diffusers import DiffusionPipeline

    index = json.loads((directory / "model_index.json").read_text())
    named = [name for name, value in index.items() if isinstance(value, list)]
    without: dict[str, Any] = {name: None for name in named if not (directory / name).is_dir()}
    if "safety_checker" in without:
        without["requires_safety_checker"] = False
    pipeline = DiffusionPipeline.from_pretrained(directory, dtype=dtype, local_files_only=True, **without)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def watched(denoiser: nn.Module, answer: Callable[[Call], Tensor] | None = None) -> Iterator[list[Call]]:
    """The calls of a denoiser by argument, nested ones as `outer.inner`; `answer` stands in for it."""
    calls: list[Call] = []
    forward = denoiser.forward
    signature = inspect.signature(forward)

    def watching(*args: Any, **kwargs: Any) -> Any:
        calls.append(_flat(signature.bind(*args, **kwargs).arguments))
        return forward(*args, **kwargs) if answer is None else (answer(calls[-1]),)

    denoiser.forward = watching
    try:
        yield calls
    finally:
        denoiser.forward = forward


def _flat(arguments: Call) -> Call:
    """Tensors alone, cloned: what is None or says how to return is no input."""
    flat: Call = {}
    for name, value in arguments.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": part for inner, part in _flat(value).items()}
        elif isinstance(value, Tensor):
            flat[name] = value.detach().clone()
    return flat
