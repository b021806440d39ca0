"""Which pictures an evaluation wants, and what their names depend on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dreambooth.config.settings import load_config
from dreambooth.data.inspection import inspect_addresses
from dreambooth.errors import InputError
from dreambooth.evaluation.protocol import Protocol, protocol_of
from pipelines.stages.evaluate_stage import compared_images
from pipelines.stages.evaluation_task import EvaluationTask, protocol_task


def protocol(*overrides: str, name: str = "rex", identifier: str = "tfz", class_noun: str = "dog") -> Protocol:
    plain: dict[str, Any] = {
        "subject": {"name": name, "class_noun": class_noun, "identifier": identifier, "instance_images": "photos"},
        "images": {"resolution": 64},
        "evaluation": {"protocol": "miniature"},
    }
    made = protocol_of(load_config(plain, overrides), dtype="float32", sampler="dpm-solver++")
    assert made is not None
    return made


def test_25_prompts_of_4_and_the_class_prompt() -> None:
    made = protocol()
    fine_tuned, base, of_class = made.fine_tuned("trained"), made.base("base"), made.of_class("trained")
    for sets, texts in (fine_tuned, made.texts), (base, made.texts_without_identifier):
        assert [prompt for pictures in sets for prompt in pictures.prompts] == [
            text for text in texts for _ in range(4)
        ]
    assert len({seed for pictures in fine_tuned for seed in pictures.seeds}) == 100
    assert fine_tuned[0].prompts[0] == "a photo of tfz dog on the grass"
    assert base[0].prompts[0] == "a photo of a dog on the grass"
    assert of_class.prompts == ("a photo of a dog",) * 16


@pytest.mark.parametrize(("images_per_prompt", "sizes"), [(2, [8] * 6 + [2]), (4, [8] * 12 + [4]), (9, [9] * 25)])
def test_whole_prompts_are_sampled_together(images_per_prompt: int, sizes: list[int]) -> None:
    made = protocol(f"evaluation.images_per_prompt={images_per_prompt}")
    for sets in made.fine_tuned("trained"), made.base("base"):
        assert [len(pictures.prompts) for pictures in sets] == [len(pictures.seeds) for pictures in sets] == sizes


def test_a_model_taught_without_a_class_noun_is_asked_without_one_and_from_the_same_noise() -> None:
    without, made = protocol("prompts.instance=a photo of {identifier}"), protocol()
    assert without.texts[0] == "a photo of tfz on the grass"
    assert without.texts_without_identifier == made.texts_without_identifier
    assert [one.seeds for one in without.fine_tuned("trained")] == [one.seeds for one in made.fine_tuned("trained")]
    assert without.class_prompt == "a photo of a dog"


def test_base_and_fine_tuned_start_from_the_same_noise() -> None:
    made = protocol()
    assert [one.seeds for one in made.fine_tuned("trained")] == [one.seeds for one in made.base("base")]


def test_subjects_of_a_class_share_the_base_models_pictures_alone() -> None:
    one, other = protocol(), protocol(name="max", identifier="bqx")
    assert [pictures.key for pictures in one.base("base")] == [pictures.key for pictures in other.base("base")]
    assert not {p.key for p in one.fine_tuned("rex")} & {p.key for p in other.fine_tuned("max")}
    cat = protocol(class_noun="cat")
    assert not {p.key for p in one.base("base")} & {p.key for p in cat.base("base")}


def test_a_pictures_name_depends_on_all_that_decides_its_pixels() -> None:
    pictures = protocol().fine_tuned("trained")[0]
    changes: dict[str, Any] = {
        "model": "other",
        "prompts": ("a photo of tfz dog",) * 8,
        "seeds": tuple(range(8)),
        "num_inference_steps": 7,
        "guidance_scale": 1.5,
        "resolution": 128,
        "dtype": "float16",
        "sampler": "euler",
    }
    assert set(changes) == set(vars(pictures))
    assert len({pictures.key} | {replace(pictures, **{name: value}).key for name, value in changes.items()}) == 9


@pytest.mark.parametrize(
    "override", ["evaluation.images_per_prompt=3", "evaluation.seed=2", "evaluation.protocol=dreambench"]
)
def test_figures_of_other_prompts_or_noise_are_not_comparable(override: str) -> None:
    assert protocol(override).prompts_key != protocol().prompts_key
    assert protocol("evaluation.guidance_scale=2", name="max").prompts_key == protocol().prompts_key


def test_auto_goes_by_the_base_model() -> None:
    assert protocol("evaluation.protocol=auto").prompts.name == "miniature"
    assert protocol("evaluation.protocol=auto", "base_model=some/model").prompts.name == "dreambench live"


def test_own_prompts() -> None:
    made = protocol("evaluation.protocol=own", "evaluation.prompts=['[V] {class_noun} at night']")
    assert made.texts == ("tfz dog at night",)
    with pytest.raises(InputError, match=r"no placeholder \[V\]"):
        protocol("evaluation.protocol=own", "evaluation.prompts=['a dog at night']")


def test_samples_can_be_compared_with_other_pictures_than_those_trained_on(instance_folder: Path) -> None:
    def task(*overrides: str) -> EvaluationTask:
        subject = {"name": "rex", "class_noun": "dog", "identifier": "tfz"}
        plain = {"subject": subject | {"instance_images": str(instance_folder / "00.png")}}
        config = load_config(plain, ("images.resolution=64", "evaluation.protocol=miniature", *overrides))
        trained = inspect_addresses(config.subject.instance_images, resolution=8, max_pixels=10**6)
        compared = compared_images(config, trained)
        made = protocol_task(config, compared, model_key="m", base_hash="b", dtype="float32", sampler="dpm-solver++")
        assert made is not None
        return made

    assert [image.address[-6:] for image in task().images] == ["00.png"]
    other = task(f"evaluation.real_images={instance_folder}")
    assert len(other.images) == 5
    assert other.key != task().key
    with pytest.raises(InputError, match="nowhere"):
        compared_images(
            other.config.model_copy(
                update={"evaluation": other.config.evaluation.model_copy(update={"real_images": ("nowhere",)})}
            ),
            inspect_addresses([str(instance_folder)], resolution=8, max_pixels=10**6),
        )


def test_none() -> None:
    plain: dict[str, Any] = {"subject": {"name": "rex", "class_noun": "dog", "instance_images": "photos"}}
    assert protocol_of(load_config(plain), dtype="float32", sampler="dpm-solver++") is None
