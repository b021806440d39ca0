"""Class images: what a set is called, what is missing of it, and that making the missing ones makes the same ones."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dreambooth.config.settings import PriorConfig
from dreambooth.sampling.class_images import PriorPlan, generate_block, image_name, image_seed, prior_plan
from dreambooth.sampling.sampler import load_pipeline, sample


def plan(**changes: Any) -> PriorPlan:
    settings = {
        "base_hash": "0123456789abcdef",
        "class_prompt": "a photo of a dog",
        "resolution": 64,
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "batch_size": 4,
        "seed": 0,
        "dtype": "float32",
        "sampler": "dpm-solver++",
        "count": 10,
    }
    return PriorPlan(**{**settings, **changes})


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline: Path) -> Any:
    return load_pipeline(tiny_pipeline, device="cpu", dtype=torch.float32)


def names(*indices: int) -> set[str]:
    return {image_name(index) for index in indices}


OTHERS: dict[str, Any] = {
    "base_hash": "fedcba9876543210",
    "class_prompt": "a photo of a cat",
    "resolution": 32,
    "num_inference_steps": 3,
    "guidance_scale": 4.5,
    "batch_size": 5,
    "seed": 1,
    "dtype": "float16",
    "sampler": "ddim",
}
"""Another value for every field that decides pixels."""


class TestKey:
    @pytest.mark.parametrize("name", OTHERS)
    def test_it_changes_with_whatever_decides_the_pixels(self, name: str) -> None:
        assert replace(plan(), **{name: OTHERS[name]}).key != plan().key

    def test_it_does_not_change_with_the_count(self) -> None:
        assert plan(count=10).key == plan(count=11).key

    def test_no_other_field_was_forgotten_here(self) -> None:
        assert {field.name for field in fields(PriorPlan)} == {*OTHERS, "count"}

    def test_it_is_the_same_on_every_machine(self) -> None:
        assert plan().recipe == "3ef68aa3bc051c11e551"

    def test_what_a_run_says_is_what_is_planned(self) -> None:
        config = PriorConfig(
            num_class_images=10, num_inference_steps=2, guidance_scale=4.0, batch_size=4, num_actors=3, seed=0
        )
        made = prior_plan(
            config,
            base_hash="0123456789abcdef",
            class_prompt="a photo of a dog",
            resolution=64,
            dtype="float32",
            sampler="dpm-solver++",
        )
        assert made == plan()


class TestMissing:
    def test_blocks_hold_whole_batches_even_at_the_end(self) -> None:
        assert plan().blocks() == [range(4), range(4, 8), range(8, 12)]
        assert plan().missing(()) == list(range(10))

    def test_of_an_interrupted_set(self) -> None:
        present = names(0, 1, 2, 3, 4, 6)
        assert plan().missing(present) == [5, 7, 8, 9]
        assert plan().blocks(present) == [range(4, 8), range(8, 12)]

    def test_of_a_whole_set_nothing(self) -> None:
        assert plan().missing(names(*range(10))) == []
        assert plan().blocks(names(*range(10))) == []

    def test_of_a_set_that_is_to_grow(self) -> None:
        present = names(*range(10))
        assert plan(count=11).missing(present) == [10]
        assert plan(count=11).blocks(present) == [range(8, 12)]
        assert plan(count=20).blocks(present) == [range(8, 12), range(12, 16), range(16, 20)]

    def test_of_a_set_that_holds_more_than_is_wanted(self) -> None:
        assert plan(count=3).missing(names(*range(10))) == []

    def test_what_is_no_class_image_does_not_count(self) -> None:
        assert plan(count=1).missing({"manifest.json", "0.png", "000000.jpg"}) == [0]

    def test_names_sort_by_index(self) -> None:
        assert [image_name(index) for index in (0, 9, 10, 123456)] == sorted(names(0, 9, 10, 123456))


class TestSeeds:
    def test_one_for_every_image_of_every_set(self) -> None:
        seeds = {image_seed(plan(seed=seed), index) for seed in (0, 1) for index in range(1000)}
        assert len(seeds) == 2000
        assert all(0 <= seed < 2**63 for seed in seeds)  # what a generator takes

    def test_they_do_not_change_when_a_set_grows(self) -> None:
        assert image_seed(plan(count=10), 3) == image_seed(plan(count=100), 3)


# diffusers' scheduler hands tensors to numpy in a way that numpy means to drop.
class TestImages:
    def test_a_block_is_always_the_same_and_no_two_images_are(self, pipeline: Any) -> None:
        wanted = plan(resolution=32)
        first = [np.asarray(image) for image in generate_block(pipeline, wanted, range(4, 8))]
        torch.manual_seed(99)
        again = [np.asarray(image) for image in generate_block(pipeline, wanted, range(4, 8))]
        other = [np.asarray(image) for image in generate_block(pipeline, wanted, range(4))]
        assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
        assert first[0].shape == (32, 32, 3)
        everything = [image.tobytes() for image in [*first, *other]]
        assert len(set(everything)) == 8

    def test_one_generator_per_seed(self, pipeline: Any) -> None:
        """What a picture shows doesn't depend on its neighbours in the batch, up to rounding."""
        settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 32, "width": 32}
        together = sample(pipeline, ["a dog"] * 3, [5, 6, 7], **settings)
        in_turn = sample(pipeline, ["a dog"] * 3, [5, 6, 7], batch_size=2, **settings)
        alone = sample(pipeline, ["a dog"], [6], **settings)
        pictures = [np.asarray(images, dtype=int) for images in (together[1], in_turn[1], alone[0])]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1
        assert np.abs(pictures[0] - pictures[2]).max() <= 1

    def test_a_seed_for_every_prompt(self, pipeline: Any) -> None:
        with pytest.raises(ValueError, match="got 1 seeds for 2 prompts"):
            sample(pipeline, ["a dog", "a cat"], [1], num_inference_steps=1, guidance_scale=4.0)
