"""Settings: what is read, what is filled in, and what is refused with which words."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dreambooth.config.overrides import parse_override
from dreambooth.config.settings import DreamBoothConfig, config_hash, load_config
from dreambooth.config.train import TrainConfig
from dreambooth.errors import InputError

SUBJECT = {"name": "rex", "class_noun": "dog", "instance_images": "photos/rex"}


def load(*overrides: str, **settings: Any) -> DreamBoothConfig:
    return load_config({"subject": SUBJECT, **settings}, overrides)


def fault(*overrides: str, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(*overrides, **settings)
    return str(caught.value)


class TestReading:
    def test_yaml_with_overrides_on_top(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text("subject: {name: rex, class_noun: dog, instance_images: photos}\ntrain: {seed: 3}\n")
        config = load_config(path, ("train.max_train_steps=400", "zero.stage=3"))
        assert (config.train.seed, config.train.max_train_steps, config.zero.stage) == (3, 400, 3)

    @pytest.mark.parametrize(
        ("override", "parsed"),
        [
            ("a.b.c=1", {"a": {"b": {"c": 1}}}),
            ("a=1e-4", {"a": "1e-4"}),
            ("a=", {"a": None}),
            ("a=x=y", {"a": "x=y"}),
            ("a=http://host:5000", {"a": "http://host:5000"}),
            ("a=[1, 2]", {"a": [1, 2]}),
            ("a=[V] dog", {"a": "[V] dog"}),
            (" a.b =true", {"a": {"b": True}}),
        ],
    )
    def test_overrides_are_yaml(self, override: str, parsed: dict[str, Any]) -> None:
        assert parse_override(override) == parsed

    @pytest.mark.parametrize(
        "override", ["images.repeats={a.b.jpg: 3}", "images.repeats.a.b.jpg=3", "images={repeats: {a.b.jpg: 3}}"]
    )
    def test_file_names_keep_their_dots(self, override: str, tmp_path: Path) -> None:
        config = load("images.repeats.c.jpg=2", override)
        assert config.images.repeats == {"c.jpg": 2, "a.b.jpg": 3}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
        assert load_config(tmp_path / "run.yaml") == config

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("images.repeats={a.jpg: 0}", "images.repeats.a.jpg: must be at least 1; got 0"),
            ("images.repeats.a.jpg=-2", "images.repeats.a.jpg: must be at least 1; got -2"),
            ("images.repeats={a.jpg: 1.5}", "images.repeats.a.jpg: must be a whole number"),
            ("images.repeats={a.jpg: true}", "images.repeats.a.jpg: expected a whole number, got true"),
            ("images.repeats={a.jpg: 1001}", "images.repeats.a.jpg: must be at most 1000"),
            ("images.repeats=3", "images.repeats: must be a mapping of names to values; got 3"),
            ("images.mask_background=0.2", "images: mask_background is 0.2, but masks is off, so nothing is weighted"),
            ("images={masks: crop, mask_background: 0}", "images: mask_background is 0.0, but masks is crop"),
            ("images.masks=on", "images.masks: must be 'off', 'weight' or 'crop'; got"),
            ("train.caption_dropout=1", "train.caption_dropout: must be less than 1"),
        ],
    )
    def test_repeats_and_shares_that_are_none(self, override: str, message: str) -> None:
        assert fault(override).startswith(message)

    def test_without_an_average_there_is_nothing_beside_it_to_keep(self) -> None:
        assert fault("train.keep_unaveraged=true").startswith(
            "train: keep_unaveraged keeps what the moving average replaces, but ema_decay is null"
        )

    def test_textual_inversion_learns_nothing_without_text(self) -> None:
        message = fault("train.method=textual_inversion", "train.caption_dropout=0.1")
        assert message.startswith("train: caption_dropout is 0.1, but method textual_inversion trains the identifier")

    def test_a_rate_in_scientific_notation(self) -> None:
        # YAML 1.1 reads 1e-4 as text for want of a point.
        assert load("train.learning_rate=1e-4").train.learning_rate == 1e-4

    @pytest.mark.parametrize("override", ["seed", "=3", "train.=3", ".seed=3", "train..seed=3"])
    def test_overrides_that_are_none(self, override: str) -> None:
        assert "--set takes a.b=value" in fault(override)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"can't read the configuration .*run\.yaml: No such file"):
            load_config(tmp_path / "run.yaml")

    @pytest.mark.parametrize("content", [b"a: [1", b"a: b: c", b"a:\n\t- b"])
    def test_not_yaml(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "run.yaml").write_bytes(content)
        with pytest.raises(InputError, match=r"run\.yaml is not valid YAML"):
            load_config(tmp_path / "run.yaml")

    @pytest.mark.parametrize(("content", "kind"), [("", "NoneType"), ("- a", "list"), ("rex", "str")])
    def test_yaml_without_settings(self, tmp_path: Path, content: str, kind: str) -> None:
        (tmp_path / "run.yaml").write_text(content)
        with pytest.raises(InputError, match=rf"should hold settings .* got {kind}"):
            load_config(tmp_path / "run.yaml")


class TestFillingIn:
    def test_the_miniature_has_defaults_of_its_own(self) -> None:
        assert load().train.max_train_steps == 400
        assert load(base_model="some/model").train.max_train_steps == 1000

    def test_and_so_has_the_miniature_of_rectified_flow(self) -> None:
        flow = load(base_model="miniature-flow")
        assert flow.train.max_train_steps == 200
        assert flow.train.min_snr_gamma is None  # it has no meaning there
        assert (flow.evaluation.num_inference_steps, flow.prior.num_inference_steps) == (16, 16)
        assert load("train.max_train_steps=7", base_model="miniature-flow").train.max_train_steps == 7

    def test_and_so_has_the_cascade_whose_text_encoder_is_trained_unless_a_user_says_no(self) -> None:
        cascade = load(base_model="miniature-cascade")
        assert (cascade.train.text_encoders, cascade.super_resolution.base_model) == ("all", "miniature-cascade")
        assert load("super_resolution.base_model=null", base_model="miniature-cascade").second_stage is None
        frozen = load("train.train_text_encoder=false", base_model="miniature-cascade").train
        assert (frozen.text_encoders, frozen.text_encoder_learning_rate) == ("none", None)

    def test_and_what_the_user_says_goes_over_them(self) -> None:
        config = load("train.max_train_steps=7", prior={"num_class_images": 9})
        assert (config.train.max_train_steps, config.prior.num_class_images) == (7, 9)
        assert config.train.learning_rate == 5e-4  # still the miniature's

    def test_the_text_encoder_learns_at_the_denoisers_rate(self) -> None:
        assert TrainConfig(learning_rate=2e-6).learning_rates == (2e-6, 2e-6)
        assert TrainConfig(learning_rate=2e-6, text_encoder_learning_rate=1e-6).learning_rates == (2e-6, 1e-6)

    def test_addresses_and_names(self) -> None:
        config = load()
        assert (config.run_uri, config.prior_uri) == ("output/rex", "output/prior")
        assert config.model_name == "dreambooth-rex"
        elsewhere = load("storage.root=s3://bucket/", "storage.run=s3://other/rex", "tracking.registered_model_name=r")
        assert (elsewhere.run_uri, elsewhere.prior_uri) == ("s3://other/rex", "s3://bucket/prior")
        assert elsewhere.model_name == "r"

    def test_a_weight_of_zero_turns_the_prior_off(self) -> None:
        assert load().prior.enabled
        assert not load("prior.prior_loss_weight=0").prior.enabled

    def test_immutable(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            load().train.seed = 1  # type: ignore[misc]

    def test_a_round_trip_changes_nothing(self) -> None:
        config = load("train.seed=5", prompts={"class": "one {class_noun}"})
        assert load_config(config.model_dump(mode="json")) == config
        assert load_config(config.model_dump(mode="json", by_alias=True)) == config


class TestRefusing:
    @pytest.mark.parametrize(
        ("override", "nearest"),
        [
            ("train.learningrate=1", "train.learning_rate"),
            ("train.max_steps=1", "train.max_train_steps"),
            ("prior.prior_weight=1", "prior.prior_loss_weight"),
            ("basemodel=x", "base_model"),
            ("subject.class_name=dog", "subject.class_noun"),
            ("max_train_steps=1", "train.max_train_steps"),
            ("zero.stages=2", "zero.stage"),
        ],
    )
    def test_an_unknown_setting_and_the_nearest_known_one(self, override: str, nearest: str) -> None:
        assert fault(override) == f"unknown setting {override.partition('=')[0]}; did you mean {nearest}?"

    def test_an_unknown_setting_like_no_other(self) -> None:
        assert fault("zzzzqqqq=1").startswith("unknown setting zzzzqqqq; ")

    @pytest.mark.parametrize(
        ("override", "where"),
        [
            ("train.max_train_steps=many", "train.max_train_steps"),
            ("train.max_train_steps=1.5", "train.max_train_steps"),
            ("train.learning_rate=[1]", "train.learning_rate"),
            ("train.text_encoders=perhaps", "train.text_encoders"),
            ("train=5", "train"),
            ("subject=rex", "subject"),
            ("engine=tensorflow", "engine"),
            ("zero.stage=4", "zero.stage"),
            ("images.crop=left", "images.crop"),
            ("base_model=5", "base_model"),
        ],
    )
    def test_a_wrong_type_or_choice(self, override: str, where: str) -> None:
        message = fault(override)
        assert message.startswith(f"{where}: ")
        assert "got " in message

    @pytest.mark.parametrize("value", [0, -1])
    @pytest.mark.parametrize(
        "setting",
        [
            "train.max_train_steps",
            "train.micro_batch_size",
            "train.gradient_accumulation_steps",
            "train.checkpoint_every",
            "prior.batch_size",
            "prior.num_class_images",
            "prior.num_actors",
            "cluster.num_workers",
            "evaluation.images_per_prompt",
            "images.max_pixels",
        ],
    )
    def test_counts_that_are_zero_or_negative(self, setting: str, value: int) -> None:
        message = fault(f"{setting}={value}")
        assert message == f"{setting}: must be at least 1; got {value}"

    @pytest.mark.parametrize("base", ["miniature", "miniature-flow", "miniature-cascade", "some/base"])
    @pytest.mark.parametrize("rate", ["identifier_learning_rate", "text_encoder_learning_rate"])
    def test_a_rate_of_what_is_not_trained(self, base: str, rate: str) -> None:
        """A frozen text encoder, and with it the identifier's embedding; the miniature's own rates are left out."""
        frozen = (f"base_model={base}", "train.text_encoders=none")
        train = load(*frozen).train
        assert (train.text_encoder_learning_rate, train.identifier_learning_rate) == (None, None)
        assert train.learning_rate == load(f"base_model={base}").train.learning_rate
        message = fault(*frozen, f"train.{rate}=1e-3")
        assert message.startswith(f"train: {rate} is 0.001, but text_encoders is none")
        assert load(*frozen, "train.method=textual_inversion", f"train.{rate}=1e-3", "prior.prior_loss_weight=0")

    @pytest.mark.parametrize("rate", ["0", "-1e-4", "2", ".nan"])
    def test_learning_rates_out_of_range(self, rate: str) -> None:
        assert fault(f"train.learning_rate={rate}").startswith("train.learning_rate: must be ")

    @pytest.mark.parametrize("resolution", [0, -64, 8, 63, 100])
    def test_resolutions_the_autoencoder_cannot_halve(self, resolution: int) -> None:
        assert f"multiple of 8, at least 16, got {resolution}" in fault(f"images.resolution={resolution}")

    def test_a_warm_up_longer_than_the_training(self) -> None:
        message = fault("train.lr_warmup_steps=400")
        assert "lr_warmup_steps is 400, but there are only 400 max_train_steps" in message

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"name": "Rex 1"}, "subject.name: a subject name becomes part of paths"),
            ({"class_noun": ""}, "subject.class_noun: expected at least one visible character"),
            (
                {"class_noun": "d\x00g"},
                "subject.class_noun: expected visible characters, got the control character U+0000",
            ),
            ({"identifier": "\u200b"}, "subject.identifier: expected visible characters"),
            ({"identifier": "dog"}, "subject: identifier and class_noun are both 'dog'"),
            ({"instance_images": []}, "subject.instance_images: expected a folder, a glob or a list"),
        ],
    )
    def test_subjects(self, changes: dict[str, Any], message: str) -> None:
        assert fault(subject={**SUBJECT, **changes}).startswith(message)

    def test_no_subject_at_all(self) -> None:
        with pytest.raises(InputError, match=r"^subject is missing$"):
            load_config({})

    def test_all_faults_are_told_at_once(self) -> None:
        lines = fault("train.seed=-1", "cluster.num_workers=0", "colour=red").splitlines()
        assert len(lines) == 3


class TestHash:
    def test_the_same_settings_have_the_same_name(self) -> None:
        assert config_hash(load("train.seed=1").train) == config_hash(load(train={"seed": 1}).train)
        assert len(config_hash(load())) == 16

    def test_any_change_gives_another(self) -> None:
        hashes = {config_hash(load(change)) for change in ("train.seed=0", "train.seed=1", "base_model=x")}
        assert len(hashes) == 3

    def test_parts_do_not_run_into_each_other(self) -> None:
        assert config_hash("ab", "c") != config_hash("a", "bc")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("cluster.use_gpu=7", "cluster.use_gpu: must be true or false, "),
        ("cluster.lanes_per_gpu=1e9", "cluster.lanes_per_gpu: must be at most 10000, "),
    ],
)
def test_a_setting_of_either_kind_has_one_fault(override: str, sentence: str) -> None:
    subject = {"name": "rex", "class_noun": "dog", "instance_images": "photos"}
    with pytest.raises(InputError) as refused:
        load_config({"subject": subject}, [override])
    [line] = str(refused.value).splitlines()
    assert line.startswith(f"{sentence}or 'auto'; got ")
