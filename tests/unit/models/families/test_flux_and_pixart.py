"""FLUX.1 and PixArt-Sigma against the plain diffusers pipelines, on tiny random replicas."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replicas import REPLICAS
from torch import Tensor

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.batches import TrainingData
from dreambooth.data.images import InstanceImage
from dreambooth.data.inspection import inspect_addresses
from dreambooth.data.prepare import prepare_data
from dreambooth.errors import InputError
from dreambooth.models.base_model import BaseModel, resolve_base_model
from dreambooth.models.delta import rebuild, write_delta
from dreambooth.models.export import export_pipeline, verify_export
from dreambooth.models.families import Tensors, family_of
from dreambooth.models.process import Diffusion, RectifiedFlow
from dreambooth.sampling.sampler import load_pipeline, load_trained, sample
from dreambooth.training.model import DreamBoothModel, load_model

NAMES = ["flux-dev", "flux-schnell", "pixart-sigma"]
PROMPTS = ["a photo of dog", "a cat on the beach"]
SIDE, STEPS = 64, 4


@pytest.fixture(scope="module", params=NAMES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(request.param, tmp_path_factory.mktemp("replica"))


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("flux-dev", tmp_path_factory.mktemp("replica"))


def built(name: str, parent: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        REPLICAS[name](parent / name)
    return parent / name


def config_of(base: Path, **train: Any) -> DreamBoothConfig:
    subject = {"name": "rex", "class_noun": "dog", "identifier": "xwz", "instance_images": "photos"}
    return load_config(
        {"base_model": str(base), "subject": subject, "images": {"resolution": SIDE}, "train": {"seed": 3} | train}
    )


def plain_pipeline(directory: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_arguments(pipeline: Any) -> dict[str, Any]:
    """So that a plain pipeline takes a size that isn't in its list, and prompts as they are."""
    if type(pipeline).__name__ == "PixArtSigmaPipeline":
        return {"use_resolution_binning": False, "clean_caption": False}
    return {}


class Spy:
    """Keeps what a denoiser's forward is called with, apart from what is None."""

    def __init__(self, denoiser: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        self._forward = denoiser.forward
        denoiser.forward = self

    def __call__(self, *positional: Any, **named: Any) -> Any:
        given = dict(zip(("hidden_states",), positional, strict=False)) | named
        self.calls.append({name: value for name, value in given.items() if value not in (None, {})
                           if not isinstance(value, Tensor)} | {n: v.clone() for n, v in given.items() if isinstance(v, Tensor)})
        return self._forward(*positional, **named)


def text_of(model: DreamBoothModel, base: Path, prompts: list[str]) -> Tensors:
    """Tokens for text encoders that are trained, and states from those that are frozen."""
    family, tokens = model.family, model.family.tokenize(base, prompts)
    text = {name: one for name, one in tokens.items() if name.partition(".")[0] in model.text_encoders}
    for part in family.text_encoders(base):
        if part.folder not in model.text_encoders:
            with torch.no_grad():
                text |= family.encode_with(part.folder, family.load(base, part.folder).eval(), tokens)
    return text


@dataclass(frozen=True)
class Given:
    """A process whose noisy x0 is this."""

    x_t: Tensor

    def noisy(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.x_t

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise

    def weight(self, timesteps: Tensor, *, min_snr_gamma: float | None) -> None:
        return None


def in_shape_of_x0(model_or_family: Any, hidden: Tensor) -> Tensor:
    side = SIDE // 8
    like = torch.empty(len(hidden), 16 if hidden.ndim == 3 else hidden.shape[1], side, side)
    return model_or_family.prediction(hidden, like)


def test_training_passes_the_arguments_of_the_pipeline(base: Path) -> None:
    pipeline = plain_pipeline(base)
    spy = Spy(pipeline.transformer)
    pipeline(
        PROMPTS,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **plain_arguments(pipeline),
    )
    model = load_model(base, config_of(base)).eval()
    ours = Spy(model.denoiser)
    for call in spy.calls:
        x_t = in_shape_of_x0(model.family, call["hidden_states"])
        model.process = Given(x_t)
        with torch.no_grad():
            model(x_t, x_t, call["timestep"].reshape(-1).expand(2), text_of(model, base, PROMPTS), {})
    assert len(spy.calls) == len(ours.calls) == STEPS
    for theirs, given in zip(spy.calls, ours.calls, strict=True):
        for both in (theirs, given):
            both.pop("joint_attention_kwargs", None)
            both.pop("return_dict")
        assert given.keys() == theirs.keys()
        for name, value in theirs.items():
            if not isinstance(value, Tensor):
                assert given[name] == value, name
                continue
            assert (given[name].dtype, given[name].shape) == (value.dtype, value.shape), name
            assert torch.equal(given[name], value), name
