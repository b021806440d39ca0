"""Subjects and the prompts made from them."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from dreambooth.config.subject import PromptTemplates, Subject, fill_identifier


def subject(**changes: Any) -> Subject:
    fields = {"name": "rex", "class_noun": "dog", "identifier": "sks", "instance_images": ("rex",)}
    return Subject(**{**fields, **changes})


@pytest.mark.parametrize("name", ["a", "7", "rex", "car-one", "a" * 63, "0-0"])
def test_names_fit_for_paths(name: str) -> None:
    assert subject(name=name).name == name


@pytest.mark.parametrize(
    "name", ["", "-", "-rex", "rex-", "Rex", "rex dog", "rex_dog", "../rex", "rex/", "réx", "rex\n", "a" * 64]
)
def test_names_unfit_for_paths(name: str) -> None:
    with pytest.raises(ValidationError, match=r"takes 1 to 63 of a-z, 0-9 and '-'"):
        subject(name=name)


@pytest.mark.parametrize("field", ["class_noun", "identifier"])
class TestWords:
    @pytest.mark.parametrize("words", ["", " ", "\u00a0", "\u3000 "])
    def test_empty(self, field: str, words: str) -> None:
        with pytest.raises(ValidationError, match="at least one visible character"):
            subject(**{field: words})

    @pytest.mark.parametrize("hidden", ["\0", "\n", "\t", "\x1b", "\x7f", "\u200b", "\u202e", "\ufeff", "\ue000"])
    def test_control_and_invisible_characters(self, field: str, hidden: str) -> None:
        with pytest.raises(ValidationError, match=rf"control character U\+{ord(hidden):04X}"):
            subject(**{field: f"to{hidden}y"})

    def test_spaces_are_made_single(self, field: str) -> None:
        assert getattr(subject(**{field: "  toy   duck "}), field) == "toy duck"


@pytest.mark.parametrize("identifier", ["dog", "Dog", " DOG "])
def test_the_identifier_is_not_the_class_noun(identifier: str) -> None:
    with pytest.raises(ValidationError, match="another, rare word"):
        subject(identifier=identifier)


@pytest.mark.parametrize("addresses", [(), ("",), ("rex", " "), ""])
def test_no_instance_images(addresses: object) -> None:
    with pytest.raises(ValidationError, match="got an empty one"):
        subject(instance_images=addresses)


def test_one_address_or_several() -> None:
    assert subject(instance_images="photos/rex").instance_images == ("photos/rex",)
    assert subject(instance_images=["1.png", "2.png"]).instance_images == ("1.png", "2.png")


def test_a_subject_is_immutable_and_knows_no_other_fields() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        subject().name = "tom"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        subject(colour="red")


class TestPrompts:
    def test_the_papers(self) -> None:
        assert PromptTemplates().instance_prompt(subject()) == "a photo of sks dog"
        assert PromptTemplates().class_prompt(subject()) == "a photo of a dog"

    def test_an_before_a_vowel(self) -> None:
        assert PromptTemplates().class_prompt(subject(class_noun="Owl")) == "a photo of an Owl"

    def test_configurable(self) -> None:
        templates = PromptTemplates(instance="{class_noun} named {identifier}", **{"class": "some {class_noun}"})
        assert templates.instance_prompt(subject()) == "dog named sks"
        assert templates.class_prompt(subject()) == "some dog"

    def test_braces_in_words_are_only_characters(self) -> None:
        odd = subject(class_noun="{dog}", identifier="{0}")
        assert PromptTemplates().instance_prompt(odd) == "a photo of {0} {dog}"

    @pytest.mark.parametrize(
        "template", ["a {noun}", "a {}", "a {0}", "a {identifier.name}", "a {identifier", "", "\n"]
    )
    def test_templates_that_cannot_work(self, template: str) -> None:
        with pytest.raises(ValidationError):
            PromptTemplates(instance=template)

    def test_no_identifier_yet(self) -> None:
        with pytest.raises(ValueError, match="'rex' has no identifier yet"):
            PromptTemplates().instance_prompt(subject(identifier=None))

    def test_the_placeholder(self) -> None:
        assert fill_identifier("[V] dog beside a [V] toy", "sks") == "sks dog beside a sks toy"
        assert fill_identifier("a dog", "sks") == "a dog"


@pytest.mark.parametrize("module", ["dreambooth.config.subject", "dreambooth.config.settings"])
def test_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
