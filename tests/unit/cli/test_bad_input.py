"""Settings that a person can get wrong: a clear message, exit code 2, and no work started.

Every case goes through the command line twice: as a dry run, and as the real thing on a Ray that must not be started.
"""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from refusing import Refused, save

from pipelines.cli import main


class TestSettings:
    @pytest.mark.parametrize(
        ("setting", "nearest"),
        [
            ("train.learningrate=1e-4", "train.learning_rate"),
            ("train.steps=3", "train.max_train_steps"),
            ("max_train_steps=3", "train.max_train_steps"),
            ("zero.level=2", "zero.stage"),
            ("clusters.num_workers=2", "cluster"),
            ("steps=3", "train.max_train_steps"),
        ],
    )
    def test_an_unknown_one_with_the_nearest_known_one(self, refused: Refused, setting: str, nearest: str) -> None:
        name = "clusters" if setting.startswith("clusters") else setting.partition("=")[0]
        assert refused("--set", setting) == f"unknown setting {name}; did you mean {nearest}?"

    def test_an_unknown_one_in_a_file(self, refused: Refused, working_folder: Path) -> None:
        (working_folder / "run.yaml").write_text("train:\n  learningrate: 0.1\n")
        message = refused("run.yaml")
        assert message == "unknown setting train.learningrate; did you mean train.learning_rate?"

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("train.max_train_steps=many", "train.max_train_steps: must be a whole number"),
            ("train.max_train_steps=1.5", "train.max_train_steps: must be a whole number"),
            ("train.max_train_steps=true", "train.max_train_steps: expected a whole number, got true"),
            ("train.learning_rate=[1]", "train.learning_rate: must be a number"),
            ("train.gradient_checkpointing=perhaps", "train.gradient_checkpointing: must be true or false"),
            ("train=5", "train: expected settings such as train.max_train_steps, got 5"),
            ("engine=tensorflow", "engine: must be 'auto', 'torch' or 'deepspeed'; got 'tensorflow'"),
            ("zero.stage=4", "zero.stage: must be 0, 1, 2 or 3; got 4"),
            ("evaluation.prompts=[]", "evaluation.prompts: "),
            ("images.resolution=100", "images.resolution: expected a multiple of 8, at least 16, got 100"),
            ("train.learning_rate=.inf", "train.learning_rate: must be "),
        ],
    )
    def test_a_wrong_type_or_choice(self, refused: Refused, setting: str, message: str) -> None:
        assert refused("--set", setting).startswith(message)

    @pytest.mark.parametrize("flag", ["--steps", "--workers", "--zero-stage"])
    def test_a_flag_of_a_wrong_type(self, refused: Refused, flag: str) -> None:
        assert f"Invalid value for '{flag}': 'many' is not a valid integer" in refused(flag, "many")

    def test_an_unknown_flag(self, refused: Refused) -> None:
        assert "No such option '--step'" in refused("--step", "3")

    @pytest.mark.parametrize("setting", ["seed", "=3", "train.=3"])
    def test_a_set_that_is_none(self, refused: Refused, setting: str) -> None:
        assert refused("--set", setting).startswith("--set takes a.b=value")

    @pytest.mark.parametrize("value", ["0", "-3"])
    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            (("--steps", "{}"), "train.max_train_steps"),
            (("--workers", "{}"), "cluster.num_workers"),
            (("--set", "train.micro_batch_size={}"), "train.micro_batch_size"),
            (("--set", "train.gradient_accumulation_steps={}"), "train.gradient_accumulation_steps"),
            (("--set", "prior.num_class_images={}"), "prior.num_class_images"),
            (("--set", "prior.batch_size={}"), "prior.batch_size"),
        ],
    )
    def test_counts_that_are_zero_or_negative(
        self, refused: Refused, arguments: tuple[str, ...], name: str, value: str
    ) -> None:
        message = refused(*(argument.format(value) for argument in arguments))
        assert message == f"{name}: must be at least 1; got {value}"

    def test_a_file_that_is_not_there(self, refused: Refused) -> None:
        assert "can't read the configuration nowhere.yaml" in refused("nowhere.yaml")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"a: [1", "run.yaml is not valid YAML"),
            (b"\xff\xfe\x00", "run.yaml begins as UTF-16-LE and breaks off"),
            (b"", "run.yaml should hold settings"),
            (b"- a", "run.yaml should hold settings"),
        ],
    )
    def test_a_file_that_holds_none(self, refused: Refused, working_folder: Path, content: bytes, message: str) -> None:
        (working_folder / "run.yaml").write_bytes(content)
        assert refused("run.yaml").startswith(message)

    def test_a_file_with_something_else_for_a_subject(self, refused: Refused, working_folder: Path) -> None:
        (working_folder / "run.yaml").write_text("subject: rex\n")
        assert refused("run.yaml") == "subject: expected settings such as subject.instance_images, got 'rex'"

    def test_a_folder_for_a_file(self, refused: Refused, working_folder: Path) -> None:
        (working_folder / "run.yaml").mkdir()
        assert "'run.yaml' is a directory" in refused("run.yaml")

    def test_nothing_at_all(self) -> None:
        result = CliRunner().invoke(main, ["run"])
        assert result.exit_code == 2
        assert "--images photos/rex" in result.stderr
        assert "--class-noun dog" in result.stderr


class TestSubject:
    @pytest.mark.parametrize("flag", ["--class-noun", "--identifier"])
    @pytest.mark.parametrize("words", ["", " ", "\u3000"])
    def test_nothing_to_be_seen(self, refused: Refused, flag: str, words: str) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        assert refused(flag, words) == f"subject.{name}: expected at least one visible character, got an empty text"

    @pytest.mark.parametrize("flag", ["--class-noun", "--identifier"])
    @pytest.mark.parametrize("hidden", ["\0", "\n", "\x1b", "\u200b", "\u202e"])
    def test_control_characters(self, refused: Refused, flag: str, hidden: str) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        message = refused(flag, f"to{hidden}y")
        assert message.startswith(f"subject.{name}: expected visible characters, got the control character U+")
        assert f"U+{ord(hidden):04X}" in message
        assert hidden not in message  # or it would act on the terminal

    @pytest.mark.parametrize("identifier", ["dog", "DOG", " Dog "])
    def test_an_identifier_that_is_the_class_noun(self, refused: Refused, identifier: str) -> None:
        message = refused("--identifier", identifier)
        assert message.startswith("subject: identifier and class_noun are both 'dog'; the identifier has to be another")

    @pytest.mark.parametrize(
        "name", ["", "My Dog", "rex/..", "../rex", "-rex", "rex-", "rex_1", "réx", "a" * 64, "rex\n", "."]
    )
    def test_a_name_unfit_for_paths(self, refused: Refused, name: str) -> None:
        message = refused("--name", name)
        assert message.startswith(
            "subject.name: a subject name becomes part of paths and model names, so it takes 1 to"
        )
        assert message.endswith(f"got {name!r}")

    def test_a_folder_that_gives_no_name(self, refused: Refused, instance_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(instance_folder, tmp_path / "___")
        assert "subject.name: a subject name becomes" in refused(images=tmp_path / "___")

    def test_no_class_noun(self, instance_folder: Path) -> None:
        result = CliRunner().invoke(main, ["run", "--images", str(instance_folder), "--dry-run"])
        assert result.exit_code == 2
        assert result.stderr.strip() == "error: subject.class_noun is missing; give it as in --class-noun dog"


class TestTexts:
    @pytest.mark.parametrize(
        ("caption", "message"),
        [
            (
                "a photo of {identifier} dog",
                "'{identifier}' is no placeholder here; write [V] where the identifier goes",
            ),
            ("a photo of [v] dog", "'[v]' is no placeholder here; write [V]"),
            ("a photo of [V] {class_noun}", "'{class_noun}' is no placeholder here; write the class noun itself"),
            (f"a photo {'on the beach ' * 8}of [V] dog", "'beach on the beach of "),
        ],
    )
    def test_a_caption_that_means_something_else(
        self, refused: Refused, tmp_path: Path, caption: str, message: str
    ) -> None:
        for name in ("1.png", "2.png", "3.png"):
            save(tmp_path / "rex" / name)
        (tmp_path / "rex" / "2.txt").write_text(caption)
        said = refused(images=tmp_path / "rex")
        assert said.startswith(f"the caption of {tmp_path}/rex/2.png")
        assert message in said

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("evaluation.prompts=['a [V] {noun}']", "evaluation.prompts.0: 'a [V] {noun}': '{noun}' is no placeholder"),
            (
                "prompts.instance='a photo of [V] dog'",
                "prompts.instance: 'a photo of [V] dog': '[V]' is no placeholder",
            ),
            (
                "prompts.class='a photo of {identifier}'",
                "prompts.class: 'a photo of {identifier}' names the identifier",
            ),
        ],
    )
    def test_a_setting_that_means_something_else(self, refused: Refused, setting: str, message: str) -> None:
        assert refused("--set", setting).startswith(message)

    def test_an_identifier_that_is_a_placeholder(self, refused: Refused) -> None:
        assert refused("--identifier", "[V]").startswith("subject.identifier: '[V]' is a placeholder; give a rare word")


class TestOtherCommands:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["identifiers", "--base-model", "./nowhere"], "base_model './nowhere': expected"),
            (["identifiers", "--limit", "0"], "Invalid value for '--limit'"),
            (["generate", "a [V] dog"], "Missing option '--model'"),
            (["generate", "--model", "./nowhere", "a [V] dog"], "./nowhere"),
            (["generate", "--model", "./nowhere", "--num", "0", "a [V] dog"], "Invalid value for '--num'"),
            (["generate", "--model", "./nowhere", " "], "the prompt is empty"),
            (["generate", "--model", "./nowhere", "a [v] dog"], "'[v]' is no placeholder here; write [V]"),
            (["generate", "--model", "./nowhere", "a [V] {class_noun}"], "write the class noun itself, such as dog"),
        ],
    )
    def test_they_refuse_in_the_same_way(self, arguments: list[str], message: str) -> None:
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert message in result.stderr

    def test_a_prompt_that_a_model_cannot_read_whole(self, tiny_pipeline: Path, working_folder: Path) -> None:
        prompt = f"a photo {'on the beach ' * 8}of a dog"
        result = CliRunner().invoke(main, ["generate", "--model", str(tiny_pipeline), prompt])
        assert result.exit_code == 2
        assert "has 29 tokens, and the base model reads 22: 'beach on the beach of a dog' is cut off" in result.stderr
        assert [path for path in working_folder.rglob("*") if path.is_file()] == []
