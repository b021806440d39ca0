"""From photographs to what the loop trains on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageOps
from replicas.plain import plain_pipeline, watched

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.batches import TrainingData
from dreambooth.data.images import InstanceImage, find_instance_images, to_pixels
from dreambooth.data.latents import encode_latents
from dreambooth.data.prepare import prepare_data
from dreambooth.data.repeats import repeats_of
from dreambooth.errors import InputError
from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.families import load_tokenizer
from dreambooth.models.families.stable_diffusion import StableDiffusion
from dreambooth.training.model import load_model

FAMILY = StableDiffusion()
IDS, STATES = "text_encoder.input_ids", "text_encoder.states"


@pytest.fixture
def config(tiny_pipeline: Path, instance_folder: Path) -> Any:
    def make(*overrides: str, images: Path = instance_folder) -> DreamBoothConfig:
        subject = {"name": "rex", "class_noun": "dog", "identifier": "tfz", "instance_images": str(images)}
        plain = {"base_model": str(tiny_pipeline), "subject": subject, "images": {"resolution": 64}}
        return load_config(plain, overrides)

    return make


def prepare(base: Path, config: DreamBoothConfig, class_images: int = 2) -> TrainingData:
    classes = [Image.new("RGB", (64, 64), (index * 60, 0, 0)) for index in range(class_images)]
    images = find_instance_images(config.subject.instance_images)
    return prepare_data(base, config, images, classes)


def words(base: Path, ids: torch.Tensor) -> str:
    return str(load_tokenizer(base).decode(ids, skip_special_tokens=True)).strip()


def test_instance_and_class_half(tiny_pipeline: Path, config: Any) -> None:
    data = prepare(tiny_pipeline, config("train.noise_offset=0.25", "train.seed=9"))
    assert data.class_ is not None
    assert (len(data.instance), len(data.class_)) == (5, 2)
    assert [words(tiny_pipeline, ids) for ids in data.instance.text[IDS]] == ["a photo of tfz dog"] * 5
    assert [words(tiny_pipeline, ids) for ids in data.class_.text[IDS]] == ["a photo of a dog"]
    assert (data.seed, len(data.process.alphas_cumprod), data.noise_offset) == (9, 1000, 0.25)
    batch = data.batch(range(3))
    assert words(tiny_pipeline, batch.text[IDS][0]) == "a photo of tfz dog"
    assert words(tiny_pipeline, batch.text[IDS][5]) == "a photo of a dog"


def test_class_images_can_come_as_latents(tiny_pipeline: Path, config: Any) -> None:
    once = prepare(tiny_pipeline, config())
    assert once.class_ is not None
    images = find_instance_images(config().subject.instance_images)
    again = prepare_data(tiny_pipeline, config(), images, once.class_.latents)
    first, second = once.batch(range(4)), again.batch(range(4))
    for name in ("latents", "noise", "timesteps"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert torch.equal(first.text[IDS], second.text[IDS])


def test_the_pixels_are_those_of_the_images_in_their_order(
    tiny_pipeline: Path, config: Any, instance_folder: Path
) -> None:
    data = prepare(tiny_pipeline, config())
    for index in (0, 4):
        with Image.open(instance_folder / f"{index:02d}.png") as image:
            square = image.resize((64, 64), Image.Resampling.LANCZOS, (4, 0, 76, 72))
        expected = encode_latents(FAMILY, FAMILY.load_vae(tiny_pipeline, "cpu"), to_pixels([square]))
        torch.testing.assert_close(data.instance.latents.mean[index], expected.mean[0])


def test_random_crops_and_mirror_images(tiny_pipeline: Path, config: Any, instance_folder: Path) -> None:
    data = prepare(tiny_pipeline, config("images.crop=random", "images.crops_per_image=3", "images.flip=true"))
    assert (data.instance.crops, len(data.instance), len(data.instance.latents)) == (6, 5, 30)
    flipped = prepare(tiny_pipeline, config("images.flip=true"))
    with Image.open(instance_folder / "03.png") as image:
        square = image.resize((64, 64), Image.Resampling.LANCZOS, (4, 0, 76, 72))
    expected = encode_latents(
        FAMILY, FAMILY.load_vae(tiny_pipeline, "cpu"), to_pixels([square, ImageOps.mirror(square)])
    )
    torch.testing.assert_close(flipped.instance.latents.mean[6:8], expected.mean)


def test_a_caption_replaces_its_images_instance_prompt(
    tiny_pipeline: Path, config: Any, instance_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(instance_folder, tmp_path / "captioned"))
    (folder / "02.txt").write_text("a photo of [V] dog in the snow\n")
    data = prepare(tiny_pipeline, config(images=folder))
    texts = [words(tiny_pipeline, ids) for ids in data.instance.text[IDS]]
    assert texts == ["a photo of tfz dog"] * 2 + ["a photo of tfz dog in the snow"] + ["a photo of tfz dog"] * 2


def test_photographs_repeat_by_name(tiny_pipeline: Path, config: Any) -> None:
    data = prepare(tiny_pipeline, config("images.repeats={03.png: 3, 00.png: 1}"))
    assert data.instance.turns == (0, 1, 2, 3, 3, 3, 4)
    assert data.class_ is not None
    assert data.class_.turns == (0, 1)
    with pytest.raises(InputError, match=r"images.repeats: 3\.png is the name of none of 5 photographs; did you mean"):
        prepare(tiny_pipeline, config("images.repeats={3.png: 3}"))


def test_a_name_that_two_photographs_have_says_nothing() -> None:
    images = [InstanceImage(address=f"{folder}/1.png") for folder in ("s3://day", "s3://night")]
    assert repeats_of(images, {}) == (1, 1)
    with pytest.raises(InputError, match=r"1\.png is the name of s3://day/1\.png and of s3://night/1\.png; rename one"):
        repeats_of(images, {"1.png": 2})


@pytest.mark.parametrize("text_encoder", ["true", "false"])
def test_caption_dropout_leaves_the_prompts_and_takes_the_empty_one(
    tiny_pipeline: Path, config: Any, text_encoder: str
) -> None:
    """Without text, the base reads what its pipeline encodes for it: ""."""
    settings = (f"train.train_text_encoder={text_encoder}", "train.caption_dropout=0.5")
    plain, data = (prepare(tiny_pipeline, config(*settings[:count])) for count in (1, 2))
    assert plain.class_ is not None
    assert data.class_ is not None
    assert plain.no_text == {}
    for half, other in ((data.instance, plain.instance), (data.class_, plain.class_)):
        for name, part in half.text.items():
            torch.testing.assert_close(part, other.text[name])
    states = plain_pipeline(tiny_pipeline).encode_prompt("a dog", "cpu", 1, True)[1]
    model = load_model(tiny_pipeline, config(*settings))
    with watched(model.denoiser) as calls, torch.no_grad():
        model(*data.batch(range(8)))
    given = calls[0]["encoder_hidden_states"]
    silent = [bool(torch.allclose(one, states[0], atol=1e-5)) for one in given]
    assert silent[:8] == silent[8:]
    assert 0 < sum(silent[:8]) < 8


def test_without_class_images_there_is_no_class_half(tiny_pipeline: Path, config: Any) -> None:
    assert prepare(tiny_pipeline, config(), class_images=0).class_ is None


def test_a_frozen_text_encoder_is_asked_once_and_before(tiny_pipeline: Path, config: Any) -> None:
    data = prepare(tiny_pipeline, config("train.train_text_encoder=false"))
    assert data.class_ is not None
    instance, class_ = data.instance.text[STATES], data.class_.text[STATES]
    assert (instance.shape, class_.shape) == ((5, 24, 16), (1, 24, 16))
    assert not instance.requires_grad
    assert not torch.equal(instance[0], class_[0])


@pytest.mark.parametrize("schedule", [{}, {"num_train_timesteps": 250}, {"trained_betas": [0.01, 0.02, 0.03]}])
def test_the_base_models_resolution_and_timesteps_where_none_are_given(
    tiny_pipeline: Path, config: Any, tmp_path: Path, schedule: dict[str, Any]
) -> None:
    base = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | schedule))
    settings = config("images.resolution=null")
    data = prepare_data(base, settings, find_instance_images(settings.subject.instance_images), [])
    known = BaseSettings(base)
    assert known.x0_shape(known.resolution) == data.instance.latents.mean.shape[1:]
    steps = DDPMScheduler.from_pretrained(base, subfolder="scheduler").config
    assert len(data.process.alphas_cumprod) == len(steps.trained_betas or range(steps.num_train_timesteps))


def test_an_identifier_that_is_not_decided(tiny_pipeline: Path, config: Any) -> None:
    with pytest.raises(ValueError, match="no identifier yet"):
        prepare(tiny_pipeline, config("subject.identifier=null"))
