"""Both stages of a cascade: fine-tuned one after the other, written as one model of two folders, sampled together."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processor import multiplies_bf16
from replicas.cascade import build
from replicas.plain import plain_pipeline
from served import Served

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.images import find_instance_images
from dreambooth.data.prepare import prepare_data
from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.export import export_pipeline, verify_export
from dreambooth.sampling.sampler import SUPER_RESOLUTION, further_seed, load_pipeline, personalized, sample
from dreambooth.training.engine import TorchEngine
from dreambooth.training.loop import fit
from dreambooth.training.model import load_model

PROMPTS = ["a photo of sks dog", "a photo of a dog"]
SAMPLING: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(tmp_path_factory.mktemp("cascade"))


@pytest.fixture
def config(bases: tuple[Path, Path], tmp_path: Path) -> DreamBoothConfig:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for place in range(2):
        Image.radial_gradient("L").rotate(90 * place).convert("RGB").save(photographs / f"{place}.png")
    subject = {"name": "rex", "class_noun": "dog", "identifier": "sks", "instance_images": str(photographs)}
    return load_config(
        {
            "base_model": str(bases[0]),
            "super_resolution": {"base_model": str(bases[1]), "max_train_steps": 2, "learning_rate": 1e-2},
            "subject": subject,
            "prior": {"prior_loss_weight": 0},
            "train": {"max_train_steps": 1, "learning_rate": 1e-3, "mixed_precision": "no"},
        }
    )


def written(config: DreamBoothConfig, target: Path) -> None:
    """Train by a configuration, and write the model."""
    base = Path(config.base_model)
    engine = TorchEngine(load_model(base, config), config.train)
    images = find_instance_images(config.subject.instance_images)
    fit(engine, prepare_data(base, config, images, []), config.train)
    state = engine.state_dict()
    export_pipeline(base, state, target)
    verify_export(target, base, state, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # older versions know no other name
def test_both_stages_are_trained_and_sampled_as_diffusers_does_it(
    bases: tuple[Path, Path], config: DreamBoothConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = config.second_stage
    assert second is not None
    written(config, tmp_path / "model")
    written(second, tmp_path / "model" / SUPER_RESOLUTION)
    cascade = load_pipeline(tmp_path / "model")
    assert cascade.super_resolution.text_encoder is cascade.text_encoder
    found = sample(cascade, PROMPTS, [3, 4], dtype=torch.float32, **SAMPLING)
    assert [picture.size for picture in found] == [(64, 64)] * 2
    drawn = sample(load_pipeline(tmp_path / "model", alone=True), PROMPTS, [3, 4], dtype=torch.float32, **SAMPLING)
    second = load_pipeline(tmp_path / "model", only_second=True)
    assert second.unet is None
    assert furthest(found, sample(second, PROMPTS, [3, 4], images=drawn, dtype=torch.float32, **SAMPLING)) == 0
    small, large = plain_pipeline(tmp_path / "model"), plain_pipeline(tmp_path / "model" / SUPER_RESOLUTION)
    pictures: dict[str, Any] = {}
    for stage, mine, scale, seeds in (
        (small, cascade, 3.0, [3, 4]),
        (large, cascade.super_resolution, 4.0, [further_seed(3), further_seed(4)]),
    ):
        stage.scheduler = copy.deepcopy(mine.scheduler)
        stage.unet.to(memory_format=torch.channels_last)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        given = {"guidance_scale": scale, "num_inference_steps": 3, "clean_caption": False, **pictures}
        pictures["image"] = stage(PROMPTS, generator=generators, **given).images
    assert furthest(found, pictures["image"]) <= 1
    base = load_pipeline(bases[0], super_resolution=bases[1])
    assert furthest(found, sample(base, PROMPTS, [3, 4], dtype=torch.float32, **SAMPLING)) > 1
    shared = personalized(base, tmp_path / "model")
    assert furthest(found, sample(shared, PROMPTS, [3, 4], dtype=torch.float32, **SAMPLING)) == 0
    multiplies_bf16(monkeypatch, False)
    served = Served(*bases, model=tmp_path / "model")
    assert furthest(found, served.pictures(PROMPTS, seed=3, **SAMPLING)) <= 1
    other = {"height": 24, "width": 16}
    found = sample(cascade, PROMPTS, [3, 4], dtype=torch.float32, **SAMPLING, **other)
    assert [picture.size for picture in found] == [(64, 96)] * 2
    assert furthest(found, served.pictures(PROMPTS, seed=3, **SAMPLING, **other)) <= 1
    alone = load_pipeline(tmp_path / "model", alone=True)
    assert sample(alone, PROMPTS[:1], [3], **SAMPLING)[0].size == (16, 16)


def furthest(found: list[Image.Image], expected: list[Image.Image]) -> int:
    pairs = zip(found, expected, strict=True)
    return max(abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() for one, other in pairs)


def test_the_second_stage_has_the_settings_of_its_own_group(config: DreamBoothConfig) -> None:
    second = config.second_stage
    assert second is not None
    assert (second.train.max_train_steps, second.train.learning_rate) == (2, 1e-2)
    assert second.base_model == config.super_resolution.base_model
    assert second.train.seed == config.train.seed
    assert not second.prior.enabled
    assert second.second_stage is None


def test_each_stage_is_refused_in_the_place_of_the_other(bases: tuple[Path, Path]) -> None:
    small, large = map(str, bases)
    assert resolve_base_model(large, scales_up=True).resolution == 64
    with pytest.raises(InputError, match="stage II, which scales up the pictures of another model"):
        resolve_base_model(large)
    with pytest.raises(InputError, match=r"super_resolution\.base_model .* is DeepFloyd IF, stage I;"):
        resolve_base_model(small, scales_up=True)
