"""The prompts of an evaluation: their numbers, their placeholders, their seeds."""

from collections import Counter
from pathlib import Path

import pytest

from dreambooth.errors import InputError
from dreambooth.evaluation.prompts import (
    EvaluationPrompt,
    PromptList,
    dreambench_subjects,
    prompt_list,
    read_prompts,
    sample_seed,
)
from dreambooth.miniature.pretraining.tokenizer import caption_words


def prompt(text: str) -> EvaluationPrompt:
    return EvaluationPrompt(text=text, application="recontextualization")


class TestShippedLists:
    @pytest.mark.parametrize(
        ("protocol", "class_noun", "applications"),
        [
            ("dreambench", "backpack", {"recontextualization": 20, "property modification": 5}),
            (
                "dreambench",
                "dog",
                {"recontextualization": 10, "accessorization": 10, "property modification": 5},
            ),
            (
                "miniature",
                "dog",
                {
                    "recontextualization": 10,
                    "art rendition": 6,
                    "property modification": 6,
                    "accessorization": 1,
                    "novel view": 2,
                },
            ),
        ],
    )
    def test_25_prompts_by_application(self, protocol: str, class_noun: str, applications: dict[str, int]) -> None:
        prompts = prompt_list(protocol, class_noun).prompts
        assert Counter(prompt.application for prompt in prompts) == applications
        assert len({prompt.text for prompt in prompts}) == 25

    def test_dreambench_is_the_papers(self) -> None:
        objects, live = prompt_list("dreambench", "clock"), prompt_list("dreambench", "cat")
        assert (objects.name, live.name) == ("dreambench objects", "dreambench live")
        assert (
            objects.prompts[12].with_identifier("sks", "clock") == "a sks clock with the Eiffel Tower in the background"
        )
        assert live.prompts[11].with_identifier("sks", "cat") == "a sks cat wearing a santa hat"
        assert live.prompts[-1].with_identifier("sks", "cat") == "a cube shaped sks cat"
        assert "CC BY 4.0" in live.source

    def test_dreambench_has_30_subjects_of_15_classes(self) -> None:
        subjects = dreambench_subjects()
        assert len(subjects) == 30
        assert len(set(subjects.values())) == 15
        assert subjects["wolf_plushie"] == "stuffed animal"

    @pytest.mark.parametrize("class_noun", ["toy", "stuffed animal toy", "hot dog stand"])
    def test_objects_get_the_prompts_of_objects(self, class_noun: str) -> None:
        assert prompt_list("dreambench", class_noun).name == "dreambench objects"

    def test_the_miniatures_prompts_are_words_it_was_pretrained_on(self) -> None:
        known = {*caption_words(), "[V]", "{class_noun}"}
        for one in prompt_list("miniature", "car").prompts:
            assert set(one.text.split()) <= known, one.text


class TestWithoutIdentifier:
    @pytest.mark.parametrize(
        ("text", "class_noun", "expected"),
        [
            ("a photo of [V] {class_noun} in the snow", "dog", "a photo of a dog in the snow"),
            ("a photo of [V] {class_noun}", "owl", "a photo of an owl"),
            ("a drawing of [V] orange {class_noun}", "dog", "a drawing of an orange dog"),
            ("a [V] {class_noun} on the beach", "dog", "a dog on the beach"),
            ("a [V] {class_noun} on the beach", "owl", "an owl on the beach"),
            ("a cube shaped [V] {class_noun}", "dog", "a cube shaped dog"),
            ("[V] {class_noun}", "dog", "a dog"),
            ("two friends with the [V] {class_noun} of [V]", "dog", "two friends with the dog of"),
        ],
    )
    def test_the_article_fits(self, text: str, class_noun: str, expected: str) -> None:
        assert prompt(text).without_identifier(class_noun) == expected


class TestSeeds:
    def test_fixed(self) -> None:
        assert sample_seed(1, "a photo of a dog", 0) == 69019882045056072
        assert sample_seed(1, "a photo of a dog", 0) < 2**63

    def test_prompt_image_and_seed_count(self) -> None:
        seeds = {
            sample_seed(seed, text, image)
            for seed in (1, 2)
            for text in ("a photo of a dog", "a photo of a cat")
            for image in range(4)
        }
        assert len(seeds) == 16


class TestRefused:
    def test_a_list_without_placeholders(self) -> None:
        with pytest.raises(InputError) as caught:
            prompt_list("own", "dog", own=["a photo of [V] dog", "a photo of a dog", "a dog"])
        assert str(caught.value) == (
            "no placeholder [V] for the identifier in 2 of 3 prompts of 'own', first 'a photo of a dog'; "
            "write them like 'a photo of [V] {class_noun} in the snow'"
        )

    def test_no_prompts(self) -> None:
        with pytest.raises(InputError, match="empty"):
            PromptList(name="mine", source="me", prompts=())

    def test_a_prompt_twice(self) -> None:
        with pytest.raises(InputError, match=r"'\[V\] dog' twice"):
            prompt_list("own", "dog", own=["[V] dog", "[V] dog"])

    def test_a_file_of_comments(self, tmp_path: Path) -> None:
        path = tmp_path / "prompts.txt"
        path.write_text("# nothing yet\n\n")
        with pytest.raises(InputError, match="holds no prompts"):
            read_prompts(path)
        with pytest.raises(InputError, match="can't read"):
            read_prompts(tmp_path / "missing.txt")

    def test_a_file_of_prompts(self, tmp_path: Path) -> None:
        path = tmp_path / "prompts.txt"
        path.write_text("# mine\n a photo of [V] {class_noun} \n\n[V] {class_noun} at night\n")
        assert read_prompts(path) == ("a photo of [V] {class_noun}", "[V] {class_noun} at night")
