"""A model's card, read as the hub reads it."""

import dataclasses
import json
import re
from typing import Any

import pytest
from huggingface_hub import ModelCard

from dreambooth.models.licence import Licence
from pipelines.report.model_card import Base, CardFacts, Measured, Sample, description, model_card

FACTS = CardFacts(
    subject="rex",
    class_noun="dog",
    identifier="sks",
    base_name="owner/base",
    base_id="owner/base",
    base_hash="0123456789abcdef",
    licence=Licence(id="other", name="a-licence", link="https://host/text"),
    pipeline_class="StableDiffusionPipeline",
    instance_prompt="a photo of sks dog",
    class_prompt="a photo of a dog",
    num_inference_steps=25,
    guidance_scale=7.5,
    training=(("steps", "400 of 1, published is step 400"), ("hardware", "2 x NVIDIA H200"), ("time", "77 s")),
    settings={"train": {"max_train_steps": 400}},
    samples=(Sample(file="samples/0.png", prompt="sks dog | on a `beach`"), Sample(file="samples/1.png", prompt="b")),
    measured=(
        Measured(bank="paper (aa)", prompts="25 prompts (dreambench) x 4", figures={"dino": (0.7, 0.6, 0.8, 25)}),
    ),
    warnings=("samples copy <the> photographs",),
)
EVALUATION: dict[str, Any] = {
    "bank": {"name": "miniature", "hash": "bb"},
    "per_prompt": [{}, {}],
    "images_per_prompt": 4,
    "prompt_list": "miniature",
    "figures": {"clip_t": {"mean": 0.31, "low": 0.3, "high": 0.32, "n": 2, "values": [0.31, 0.31]}},
    "warnings": ["few prompts are followed"],
}


def test_its_metadata_are_the_hubs() -> None:
    data = ModelCard(model_card(FACTS)).data.to_dict()
    assert data["license"] == "other"
    assert data["license_name"] == "a-licence"
    assert data["license_link"] == "https://host/text"
    assert data["base_model"] == "owner/base"
    assert data["base_model_relation"] == "finetune"
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image"
    assert "dreambooth" in data["tags"]
    assert data["widget"][0] == {"text": "sks dog | on a `beach`", "output": {"url": "samples/0.png"}}


@pytest.mark.parametrize(
    ("form", "loaded"),
    [
        ("diffusers", "DiffusionPipeline.from_pretrained('me/rex')"),
        ("single-file", "StableDiffusionPipeline.from_single_file('me/rex', config='owner/base')"),
        ("lora", "DiffusionPipeline.from_pretrained('owner/base')\npipeline.load_lora_weights('me/rex')"),
    ],
)
def test_its_code_loads_the_form(form: Any, loaded: str) -> None:
    card = ModelCard(model_card(FACTS, form=form, place="me/rex"))
    [code] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    compile(code, "card", "exec")
    assert loaded in code
    assert card.data.to_dict()["base_model_relation"] == ("adapter" if form == "lora" else "finetune")


def test_what_it_says() -> None:
    text = model_card(FACTS)
    for said in (
        "| DINO | 0.700 | 0.600 to 0.800 | 25 |",
        "Bank paper (aa), 25 prompts (dreambench) x 4",
        "[a-licence](https://host/text)",
        "| hardware | 2 x NVIDIA H200 |",
        "max_train_steps: 400",
        "Warning: samples copy \\<the\\> photographs.",
        "| sample | `` sks dog \\| on a `beach` `` |",
    ):
        assert said in text, text


def test_a_cascade_has_two_bases_and_their_licences() -> None:
    second = Base(name="owner/large", id="owner/large", hash="ff", licence=Licence(id="mit"))
    facts = dataclasses.replace(FACTS, cascade=True, second_base=second)
    assert CardFacts.from_json(facts.as_json()) == facts
    card = ModelCard(model_card(facts))
    assert card.data.to_dict()["base_model"] == ["owner/base", "owner/large"]
    for said in (
        "[owner/base](https://huggingface.co/owner/base) and [owner/large](https://huggingface.co/owner/large), fine-",
        "The base model's licence is [a-licence](https://host/text)",
        "with hash `ff`. The second stage's base model's licence is mit",
    ):
        assert said in card.text
    unknown = dataclasses.replace(facts, second_base=dataclasses.replace(second, licence=None))
    assert "licence of the second stage's base model isn't known here" in model_card(unknown)


def test_a_card_of_an_earlier_version_is_read() -> None:
    plain = json.loads(FACTS.as_json())
    del plain["second_base"]
    assert CardFacts.from_json(json.dumps(plain)) == FACTS


def test_figures_of_two_banks_stand_apart_and_later_ones_in_the_place_of_earlier() -> None:
    both = FACTS.with_figures(EVALUATION)
    assert [each.bank for each in both.measured] == ["paper (aa)", "miniature (bb)"]
    assert both.warnings == ("few prompts are followed",)
    assert both.with_figures(EVALUATION) == both
    assert model_card(both).count("## Figures") == 1
    assert model_card(both).count("| CLIP-T | 0.310 |") == 1


def test_encoders_beside_the_bank_are_told_apart() -> None:
    dinov2 = {"mean": 0.4, "low": 0.3, "high": 0.5, "n": 2, "bank": {"name": "dinov2", "hash": "cc"}}
    measured = EVALUATION | {"figures": EVALUATION["figures"] | {"dinov2": dinov2}}
    facts = FACTS.with_figures(measured)
    assert [each.bank for each in facts.measured] == ["paper (aa)", "miniature (bb)", "dinov2 (cc)"]
    assert "| DINOv2 | 0.400 | 0.300 to 0.500 | 2 |\n\nBank dinov2 (cc)" in model_card(facts)


def test_facts_are_read_as_they_were_written() -> None:
    for facts in (FACTS, FACTS.with_figures(EVALUATION), dataclasses.replace(FACTS, licence=None, samples=())):
        assert CardFacts.from_json(facts.as_json()) == facts


def test_a_description_has_the_figures_and_fits() -> None:
    text = description(FACTS, most=5000)
    assert "| DINO | 0.700 |" in text
    assert "samples/0.png" not in text
    assert "max_train_steps" not in text
    assert len(description(FACTS, most=100)) == 100


def test_little_is_known_of_a_base_that_is_not_on_the_hub() -> None:
    facts = dataclasses.replace(FACTS, base_id=None, base_name="A base model that isn't on the hub", licence=None)
    card = ModelCard(model_card(facts))
    assert "license" not in card.data.to_dict()
    assert "base_model" not in card.data.to_dict()
    assert "isn't known here" in card.text
