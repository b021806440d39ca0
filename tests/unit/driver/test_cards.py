"""Cards beside published models: which one is found, and what a later one keeps."""

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreambooth.config.settings import load_config
from pipelines.apps.garbage import find_leftovers
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.cards import Card, _public_name, _spread, add_figures, card_of, find_card, publish_card
from pipelines.driver.train_stage import TrainResult
from pipelines.plan.run_plan import make_plan
from pipelines.report.model_card import CardFacts, Sample, model_card
from pipelines.storage.publications import Manifest, publish, published

FACTS = CardFacts(
    subject="rex",
    class_noun="dog",
    identifier="sks",
    base_name="miniature",
    base_id=None,
    base_hash="0" * 16,
    training=(("program", "commit a"),),
    samples=(Sample(file="samples/0.png", prompt="a"),),
)
CARD = Card(facts=FACTS, pictures={"samples/0.png": b"picture"})
METADATA = {name: getattr(FACTS, name) for name in ("subject", "class_noun", "identifier", "base_hash")}


def evaluation(bank: str) -> dict[str, Any]:
    figure = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 2, "values": [0.4, 0.6]}
    return {
        "bank": {"name": bank, "hash": "aa"},
        "per_prompt": [{}, {}],
        "images_per_prompt": 4,
        "prompt_list": "own",
        "figures": {"dino": figure},
        "warnings": [],
    }


@pytest.fixture
def model(tmp_path: Path) -> Manifest:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model_index.json").write_text("{}")
    metadata = METADATA | {"key": "k", "base_model": str(tmp_path / "secret")}
    return publish(weights, str(tmp_path / "rex" / "model"), metadata=metadata)


def cards_of(tmp_path: Path, key: str) -> list[Path]:
    return sorted((tmp_path / "rex" / "card" / key).glob("*/manifest.json"))


def test_the_same_card_is_published_once(model: Manifest, tmp_path: Path) -> None:
    first = publish_card(CARD, str(tmp_path / "rex"), "k")
    assert first.uri is not None
    assert (Path(first.uri) / "README.md").read_text().startswith("---\n")
    again = publish_card(
        replace(CARD, facts=replace(FACTS, training=(("program", "commit b"),))), str(tmp_path / "rex"), "k"
    )
    assert again.uri == first.uri
    assert again.facts.training == (("program", "commit a"),)  # it was trained by that
    assert len(cards_of(tmp_path, "k")) == 1
    assert find_card(model) == CARD


def test_figures_of_several_banks_gather(model: Manifest, tmp_path: Path) -> None:
    run = str(tmp_path / "rex")
    assert add_figures(model, evaluation("paper")) is None  # it has no card
    publish_card(CARD, run, "k")
    add_figures(model, evaluation("paper"))
    add_figures(model, evaluation("miniature"))
    concluded_again = publish_card(replace(CARD, facts=FACTS.with_figures(evaluation("paper"))), run, "k")
    assert [each.bank for each in concluded_again.facts.measured] == ["paper (aa)", "miniature (aa)"]
    assert len(cards_of(tmp_path, "k")) == 3
    assert published(str(tmp_path / "rex" / "model")) == model


def test_a_model_of_another_key_has_a_card_of_its_own(model: Manifest, tmp_path: Path) -> None:
    publish_card(replace(CARD, facts=replace(FACTS, subject="other")), str(tmp_path / "rex"), "other key")
    found = find_card(model)
    assert found is not None
    assert found.uri is None  # made of what the manifest says
    assert found.facts.subject == "rex"
    found.write(tmp_path)
    assert str(tmp_path) not in (tmp_path / "README.md").read_text()


def test_a_card_whose_writing_broke_off_is_passed_over_and_can_be_removed(model: Manifest, tmp_path: Path) -> None:
    uri = publish_card(CARD, str(tmp_path / "rex"), "k").uri
    (Path(str(uri)) / "manifest.json").unlink()
    found = find_card(model)
    assert found is not None
    assert not found.pictures
    leftovers = find_leftovers(str(tmp_path), older_than=datetime.timedelta(0))
    assert [leftover.uri for leftover in leftovers] == [uri]


def test_a_cards_settings_are_those_of_the_images_and_of_both_stages(tmp_path: Path) -> None:
    Image.radial_gradient("L").save(tmp_path / "rex in the garden.png")
    settings = {
        "base_model": "miniature-cascade",
        "subject": {"name": "rex", "class_noun": "dog", "identifier": "tfz", "instance_images": str(tmp_path)},
        "images": {"flip": True, "repeats": {"rex in the garden.png": 3}},
        "prior": {"prior_loss_weight": 0},
    }
    plan = make_plan(load_config(settings), Resources(cpus=2, gpus=0))
    manifest = Manifest(uri="/rex/model/20260101T000000000000Z-01234567", files={}, metadata={})
    record: dict[str, Any] = {"history": (), "scores": (), "exported_step": 10, "peak_memory_bytes": (0,)}
    trained = TrainResult(model=manifest, steps=9000, steps_per_second=10, resumed_from=0, **record)
    trained = replace(trained, second=replace(trained, steps=150, exported_step=100))
    facts = card_of(plan, trained, None, None).facts
    assert facts.settings["images"]["flip"] is True
    assert facts.settings["images"]["masks"] == "off"
    assert facts.settings["images"]["repeats"] == ["1 photograph 3 times"]
    assert facts.settings["super_resolution"]["max_train_steps"] == 150
    assert dict(facts.training)["time"] == "15 min of steps, 10.00 steps/s"
    assert dict(facts.training)["second stage"] == "150 steps; published is step 100"
    assert facts.second_base is not None
    assert facts.second_base.hash != facts.base_hash
    text = model_card(facts)
    assert text.count("licence is apache-2.0") == 2
    assert "garden" not in text
    alone = load_config(settings | {"base_model": "miniature"})
    assert (
        "super_resolution"
        not in card_of(make_plan(alone, Resources(cpus=2, gpus=0)), trained, None, None).facts.settings
    )


@pytest.mark.parametrize(
    ("base_model", "hub_id"),
    [
        ("owner/name", "owner/name"),
        ("owner/name/model.safetensors#stable-diffusion-v1-5/stable-diffusion-v1-5", "owner/name"),
        ("miniature", None),
        ("/home/me/models/base", None),
        ("/home/me/model.safetensors#owner/name", None),
        ("./models/base", None),
        ("s3://my-bucket/base", None),
    ],
)
def test_a_bases_public_name_does_not_tell_where_it_lies(base_model: str, hub_id: str | None) -> None:
    name, found = _public_name(base_model)
    assert found == hub_id
    assert "/me" not in name
    assert "bucket" not in name


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        (["ab", "cd", "ef", "gh", "ij"], "aceg"),
        (["ab", "cd"], "acbd"),
        (["abcdef"], "abcd"),
        (["a", "bcd"], "abcd"),
        (["a"], "a"),
        ([], ""),
        ([chr(97 + place) for place in range(25)], "agms"),
    ],
)
def test_samples_are_of_as_many_prompts_as_there_are(rows: list[str], chosen: str) -> None:
    assert "".join(_spread(rows)) == chosen
