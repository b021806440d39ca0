"""Text files as editors and spreadsheets save them, and YAML that is read as it was meant or not at all."""

from pathlib import Path

import pytest

from dreambooth.config.settings import load_config
from dreambooth.config.strict_yaml import parse_yaml
from dreambooth.config.text_files import decode_text
from dreambooth.errors import InputError

TEXT = "subject: {name: rex, class_noun: café, instance_images: photos}\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_an_encoding_that_says_which_it_is(tmp_path: Path, encoding: str, ends: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes((TEXT.replace("\n", ends) + "train: {seed: 3}").encode(encoding))
    config = load_config(path)
    assert (config.subject.class_noun, config.train.seed) == ("café", 3)


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"])
def test_either_order_of_bytes(mark: bytes) -> None:
    assert decode_text(mark + "é".encode("utf-16-le" if mark[0] == 0xFF else "utf-16-be"), "it") == "é"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nname: caf\xe9", "it is not UTF-8: line 2 holds the byte 0xE9 (in Windows-1252 the line would read "),
        (b"\x81\x81", "it is not UTF-8: line 1 holds the byte 0x81 (it may be no text at all)"),
        (b"\xff\xfea", "it begins as UTF-16-LE and breaks off"),
        ("a: 1".encode("utf-16-le"), "it looks like UTF-16 without its byte-order mark"),
        ("a: 1".encode("utf-16-be"), "it looks like UTF-16 without its byte-order mark"),
        (b"a long line with a \0 in it", "it holds the control character U+0000"),
    ],
)
def test_an_encoding_that_cannot_be_known(content: bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        decode_text(content, "it")
    assert str(caught.value).startswith(message)
    assert "save it as UTF-8" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: 2\na: 3", "'a' is there twice, in line 1 and in line 3"),
        ("x:\n  y: [{a: 1,\n  a: 1}]", "'a' is there twice, in line 2 and in line 3"),
        ("'a': 1\na: 1", "'a' is there twice"),
        ("a: &a [*a]", "line 1: an alias (*name) stands inside its own value"),
        ("? [a]\n: 1", "line 1: expected a name for a key"),
        ("<<: 5", "line 1: << takes mappings"),
        ("a: !!set {x}", "line 1 has a value of the kind"),
        ("a: 1\n---\nb: 1", "not valid YAML"),
        ("[" * 5000, "nested too deep"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x]\n"
            + "\n".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcd", "bcde", strict=True)),
            "multiply",
        ),
    ],
)
def test_yaml_that_is_refused(content: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_yaml(content, "it")
    assert message in str(caught.value)


def test_merged_keys_are_no_repetition() -> None:
    assert parse_yaml("all: &all {x: 1, y: 2}\nrex: {<<: *all, y: 3}", "it")["rex"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("written", "reading"),
    [
        ("007", "the number 7"),
        ("0x1F", "the number 31"),
        ("1_000", "the number 1000"),
        ("12:30:00", "the number 45000"),
        ("1.10", "the number 1.1"),
        ("NO", "false"),
        ("on", "true"),
        ("Yes", "true"),
        ("True", "true"),
        ("2024-05-01", "a date"),
    ],
)
@pytest.mark.parametrize("setting", ["subject.name", "subject.class_noun", "storage.root", "evaluation.prompts"])
def test_what_yaml_reads_as_something_else_than_text(setting: str, written: str, reading: str) -> None:
    value = f"[{written}]" if setting == "evaluation.prompts" else written
    subject = {"name": "rex", "class_noun": "dog", "instance_images": "photos"}
    assert load_config({"subject": subject}, (f"storage.root='{written}'",)).storage.root == written
    with pytest.raises(InputError) as caught:
        load_config({"subject": subject}, (f"{setting}={value}",))
    assert str(caught.value) == f'{setting}: YAML reads {written} as {reading}; quote it: "{written}"'
    assert load_config({"subject": subject}, (f"storage.prior='{written}'",)).storage.prior == written


@pytest.mark.parametrize(
    ("setting", "written", "value"),
    [
        ("train.learning_rate", "5e-6", 5e-6),
        ("train.learning_rate", "5.0e-06", 5e-6),
        ("train.learning_rate", ".5", 0.5),
        ("train.max_train_steps", "1e3", 1000),
        ("train.max_train_steps", "1_000", 1000),
        ("train.max_train_steps", "0400", 400),
        ("registry.storage", "delta", "delta"),
        ("train.gradient_checkpointing", "off", False),
        ("train.gradient_checkpointing", "TRUE", True),
        ("cluster.use_gpu", "no", False),
    ],
)
def test_numbers_and_switches_take_what_they_took(setting: str, written: str, value: object) -> None:
    subject = {"name": "rex", "class_noun": "dog", "instance_images": "photos"}
    config = load_config({"subject": subject}, (f"{setting}={written}",))
    group, name = setting.split(".")
    assert getattr(getattr(config, group), name) == value


def test_nothing_where_text_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("subject: {name: rex, class_noun: ~, instance_images: photos}")
    with pytest.raises(InputError, match=r"subject\.class_noun: expected text, got nothing, which is what YAML reads"):
        load_config(tmp_path / "run.yaml")


def test_a_setting_given_in_two_ways(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train.seed: 3\ntrain: {seed: 4}\n")
    with pytest.raises(
        InputError, match=r"run\.yaml: train\.seed is given twice, as 3 and as 4; leave one of them out"
    ):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("setting", ["class_noun", "instance_images"])
def test_a_lone_surrogate(tmp_path: Path, setting: str) -> None:
    subject = {"name": "rex", "class_noun": "dog", "instance_images": "photos"} | {setting: '"a\\ud800b"'}
    (tmp_path / "run.yaml").write_text(
        "\n".join(["subject:", *(f"  {key}: {value}" for key, value in subject.items())])
    )
    with pytest.raises(
        InputError, match=rf"subject\.{setting}: expected visible characters, got the control character U\+D800"
    ):
        load_config(tmp_path / "run.yaml")
