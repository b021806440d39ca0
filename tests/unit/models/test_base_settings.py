"""Configurations of base models: the library's own values for what isn't there, and a sentence for what is wrong."""

import enum
import inspect
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.config_fields import Field
from dreambooth.models.families import FAMILIES, Family, load_tokenizer
from dreambooth.models.families.stable_diffusion import StableDiffusion
from dreambooth.sampling.sampler import load_trained, sample
from dreambooth.training.model import load_components

FIELDS = StableDiffusion.fields
EACH = [(family, field) for family in FAMILIES for field in family.fields if not field.name.startswith("_")]
GONE = enum.Enum("Field", ["GONE"]).GONE


@pytest.fixture
def base(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))


def put(base: Path, field: Field, value: Any) -> None:
    """Give a field a value, or take it out."""
    path = base / field.file
    settings = json.loads(path.read_text())
    settings.pop(field.name, None)
    path.write_text(json.dumps(settings if value is GONE else settings | {field.name: value}))


VALUES: tuple[Any, ...] = (
    GONE,
    None,
    [],
    [16, 16],
    [None],
    "16",
    "",
    True,
    0,
    -1,
    0.5,
    10**400,
    float("nan"),
    {},
    {"a": 1},
)


def fault(use: Callable[[], object]) -> str | None:
    """What an InputError says; anything else is raised."""
    try:
        use()
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.key)
def test_whatever_a_field_holds_it_is_used_or_named(base: Path, field: Field) -> None:
    used = []
    for value in VALUES:
        put(base, field, value)
        told = fault(lambda: resolve_base_model(str(base)))
        if told is None:
            found, used = resolve_base_model(str(base)), [*used, value]
            assert BaseSettings(base)[field.key] == (field.default if value is GONE else value)
            for use in (partial(getattr, found, "resolution"), partial(found.embedding_width, "text_encoder")):
                told = fault(use)
                assert told is None or field.name in told, value
            assert load_tokenizer(base).model_max_length <= 24
        else:
            assert field.name in told, value
            assert str(base) in told, value
    # Where the library has a value of its own, a base that leaves the field out is as good as another.
    assert GONE in used or field.name == "block_out_channels"


@pytest.mark.parametrize(("family", "field"), EACH, ids=lambda value: getattr(value, "key", ""))
def test_a_missing_field_has_the_librarys_default(family: Family, field: Field) -> None:
    component = family.component(field.file.partition("/")[0])
    if component.role == "text_encoder":
        assert getattr(component.load_class().config_class(), field.name) == field.default
    elif component.role != "tokenizer":
        kind = component.load_class()
        assert inspect.signature(kind.__init__).parameters[field.name].default == field.default


@pytest.mark.parametrize(
    ("size", "resolution"), [([16, 16], 64), (16, 64), ([16, 24], None), (None, None), (GONE, None)], ids=str
)
def test_the_size_that_a_base_was_trained_at(base: Path, size: Any, resolution: int | None) -> None:
    put(base, FIELDS[0], size)
    found = resolve_base_model(str(base))
    if resolution is not None:
        assert found.resolution == resolution
        return
    with pytest.raises(InputError, match=r"sample_size is .*images\.resolution for training"):
        _ = found.resolution


@pytest.mark.parametrize("length", [GONE, None, 1e30, 10**30, 77, 24], ids=str)
def test_a_tokenizer_that_names_no_length_ends_where_the_text_encoder_does(base: Path, length: Any) -> None:
    put(base, next(field for field in FIELDS if field.name == "model_max_length"), length)
    components = load_components(base)
    assert components.family.tokenize(base, ["a photo of a dog"])["text_encoder.input_ids"].shape == (1, 24)
    pipeline = load_trained(base, {}, device="cpu", dtype=torch.float32)
    [image] = sample(pipeline, ["a photo of a dog"], [0], num_inference_steps=1, guidance_scale=4.0)
    assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("time_cond_proj_dim", 8, "distilled"),
        ("in_channels", 9, "inpainting"),
    ],
)
def test_a_unet_that_takes_more_than_is_given_to_it_in_training(base: Path, name: str, value: int, told: str) -> None:
    put(base, next(field for field in FIELDS if field.name == name), value)
    with pytest.raises(InputError, match=told):
        resolve_base_model(str(base))


def test_the_shape_of_latents(base: Path) -> None:
    assert BaseSettings(base).x0_shape(64) == (4, 16, 16)
