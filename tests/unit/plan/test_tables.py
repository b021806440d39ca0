"""Tables as people and spreadsheets write them, and what a folder says of its subject: through the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from dreambooth.config.settings import DreamBoothConfig
from pipelines.cli import main
from pipelines.plan.subject_list import read_batch

HEADER = "name,class_noun,instance_images"
ROW = "rex,dog,photos/rex"
Write = Callable[[str, bytes | str], str]


@pytest.fixture
def write(working_folder: Path) -> Write:
    def write(name: str, content: bytes | str) -> str:
        path = working_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return write


def refused(*arguments: str) -> str:
    """What the command line says, without any work."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def configs(address: str) -> list[DreamBoothConfig]:
    found = [(subject.config, subject.faults) for subject in read_batch(address)]
    assert [faults for _, faults in found if faults] == []
    return [config for config, _ in found if config is not None]


@pytest.mark.parametrize(
    "content",
    [
        f"{HEADER}\n{ROW}\n,,\n\n , ,\n,,,\n",
        f"\n,,\n{HEADER}\n,,\n{ROW}\n",
        f"{HEADER}\r\n{ROW}\r\n,,\r\n",
        f"{HEADER}\r{ROW}\r",
        f"{HEADER},,\n{ROW},,\n",
        "\ufeffname, Class Noun ,INSTANCE_IMAGES\nrex,dog,photos/rex\n",
        f"{HEADER}\n{ROW}\n".replace(",", ";"),
        f"sep=;\n{HEADER}\n{ROW}\n".replace(",", ";"),
        f"{HEADER}\n{ROW}\n".replace(",", "\t"),
        f"{HEADER}\n{ROW}\n".replace(",", "\t").encode("utf-16"),
        f"{HEADER}\n{ROW}\n".encode("utf-16"),
        f'{HEADER},note\n{ROW},"two lines,\nof a person\'s"\n',
    ],
)
def test_a_spreadsheets_export(write: Write, content: bytes | str, working_folder: Path) -> None:
    (config,) = configs(write("s.csv", content))
    assert (config.subject.name, config.subject.class_noun) == ("rex", "dog")
    assert config.subject.instance_images == (str(working_folder / "photos/rex"),)


def test_several_lines_in_a_cell_are_several_images(write: Write, working_folder: Path) -> None:
    (config,) = configs(write("s.csv", f'{HEADER}\nrex,dog,"a.jpg\nb.jpg; c.jpg"\n'))
    assert config.subject.instance_images == tuple(f"{working_folder}/{name}.jpg" for name in "abc")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.csv", f"{HEADER},class_noun\n{ROW},cat\n", "the column 'class_noun' is there 2 times; leave one of them"),
        ("s.csv", f"{HEADER},Class Noun\n{ROW},cat\n", "the column 'class_noun' is there 2 times"),
        (
            "s.csv",
            "name,class_nuon,instance_images\n",
            "the column 'class_nuon' is no setting; did you mean class_noun?",
        ),
        ("s.csv", f"{HEADER},train.max_steps\n{ROW},5\n", "did you mean train.max_train_steps?"),
        ("s.csv", f"{HEADER}\n{ROW},more\n", "line 2 has more cells than there are columns ('more')"),
        ("s.csv", f"{HEADER},\n{ROW},more\n", "line 2 has more cells than there are columns ('more')"),
        (
            "s.csv",
            f"{HEADER},train.max_train_steps\n{ROW},1.000\n".replace(",", ";"),
            "line 2: train.max_train_steps is 1.000, which people read differently; write 1000 or 1",
        ),
        (
            "s.csv",
            f"{HEADER},train.max_train_steps\n{ROW},1.200\n".replace(",", ";"),
            "is 1.200, which people read differently; write 1200 or 1.2",
        ),
        ("s.csv", f'{HEADER}\nrex,dog,"photos\nmug,cup,x\n', "is a quoted cell left open?"),
        ("s.csv", f"{HEADER},train.seed\n{ROW},#N/A\n", "line 2: train.seed is '#N/A', which is no value"),
        ("s.csv", f"{HEADER}\nrex,café,x\n".encode("cp1252"), "s.csv is not UTF-8: line 2 holds the byte 0xE9"),
        ("s.yaml", "subjects: []\nsubjects: []\n", "'subjects' is there twice, in line 1 and in line 2"),
        ("s.yaml", "train: {seed: 1}\ntrain.seed: 2\nsubjects: []\n", "train.seed is given twice, as 1 and as 2"),
        ("s.jsonl", '{"name": "rex", "name": "mug"}', "line 1: 'name' is there twice, as 'rex' and as 'mug'"),
        ("s.jsonl", '{"name": "rex", "train.learning_rate": NaN}', "line 1: NaN is no number of JSON's"),
        ("s.jsonl", '\n{"name": "rex", "train.learning_rate": -Infinity}', "line 2: -Infinity is no number"),
        ("s.jsonl", "[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_a_table_that_is_refused(write: Write, name: str, content: bytes | str, message: str) -> None:
    assert message in refused("batch", write(name, content), "--dry-run")


def row(**settings: str) -> str:
    given = {"name": "rex", "class_noun": "dog", "instance_images": "x"} | settings
    return "- {" + ", ".join(f"{key}: {value}" for key, value in given.items()) + "}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (row(name="007"), 'subject.name: YAML reads 007 as the number 7; quote it: "007"'),
        (row(name="backpack_dog"), "write backpack-dog; got 'backpack_dog'"),
        (row(name="My Dog"), "write my-dog; got 'My Dog'"),
        (row() + row(), "the name 'rex' is taken 2 times (upper and lower case count as the same): line 1, line 2"),
        (
            row() + "\n" + row(name="Rex"),
            "the name 'rex' is taken 2 times (upper and lower case count as the same): line 1, line 3",
        ),
        (
            row() + row(**{"name": "mug", "train.seed": "1", "train": "{seed: 2}"}),
            "line 2: train.seed is given twice, as 1 and as 2; leave one of them out",
        ),
        (row(**{"subject.name": "mug"}), "line 1: subject.name is given twice, as 'rex' and as 'mug'"),
    ],
)
def test_a_subject_that_is_refused(write: Write, content: str, message: str) -> None:
    listed = read_batch(write("s.yaml", content))
    assert message in "\n".join(fault for subject in listed for fault in subject.faults)
    assert "can't be trained" in refused("batch", "s.yaml", "--dry-run")


def test_only_line_feeds_end_a_line_of_jsonl(write: Write) -> None:
    line = '{"name": "rex", "class_noun": "dog", "instance_images": "x", "note": "a\u2028b\u0085c\x0bd"}'
    assert len(configs(write("s.jsonl", line.replace("\x0b", "\\u000b") + "\r\n"))) == 1


def test_a_caption_in_another_encoding(tiny_pipeline: Path, instance_folder: Path, working_folder: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(instance_folder, working_folder / "rex"))
    (folder / "00.txt").write_bytes("un café [V]".encode("cp1252"))
    run = ("run", "--images", "rex", "--class-noun", "dog", "--base-model", str(tiny_pipeline), "--dry-run")
    assert "00.txt is not UTF-8: line 1 holds the byte 0xE9" in refused(*run)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "spelled"), [("backpack_dog", "backpack-dog"), ("My Dog", "my-dog"), ("Réx", "rex"), ("-rex-", "rex")]
    )
    @pytest.mark.parametrize("command", [("run", "--images", "x", "--class-noun", "dog"), ("batch", "s.yaml")])
    def test_one_that_needs_another_spelling_is_given_it(
        self, write: Write, command: tuple[str, ...], name: str, spelled: str
    ) -> None:
        write("s.yaml", row())
        assert f"write {spelled}; got {name!r}" in refused(*command, "--name", name, "--dry-run")


class TestSubjectFile:
    """`run` reads what lies beside the images wherever they lie, as `batch` does."""

    SAYS = "{class_noun: dog, identifier: tfz, train: {max_train_steps: 7}}"

    def settings(self, *arguments: str) -> DreamBoothConfig:
        from pipelines.cli.run import _settings

        flags = dict.fromkeys(
            ["class_noun", "name", "identifier", "base_model", "steps", "workers", "zero_stage", "output", "address"]
        )
        overrides = tuple(argument for argument in arguments if "=" in argument)
        images = next((argument for argument in arguments if "=" not in argument), None)
        return _settings(None, {**flags, "images": images}, overrides)

    @pytest.fixture(params=["", "memory://"])
    def place(self, request: pytest.FixtureRequest, working_folder: Path) -> str:
        from pipelines.storage.files import write_bytes

        place = f"memory://{working_folder.parent.name}" if request.param else str(working_folder)
        write_bytes(f"{place}/My Rex/subject.yaml", self.SAYS.encode("utf-16"))
        write_bytes(f"{place}/My Rex/1.png", b"")
        return place

    @pytest.mark.parametrize(
        "images",
        [
            "{}/My Rex",
            "{}/My Rex/",
            "{}/My Rex/*.png",
            "{}/My Rex/1.png",
            "subject.instance_images=[{0}/My Rex/1.png, {0}/My Rex/*.jpg]",
        ],
    )
    def test_it_is_read_beside_folders_globs_and_lists(self, place: str, images: str) -> None:
        config = self.settings(images.format(place))
        assert (config.subject.name, config.subject.class_noun, config.subject.identifier) == ("my-rex", "dog", "tfz")
        assert config.train.max_train_steps == 7
        assert self.settings(images.format(place), "train.max_train_steps=9").train.max_train_steps == 9

    def test_run_and_batch_agree(self, place: str) -> None:
        (of_batch,) = configs(place)
        of_run = self.settings(f"{place}/My Rex")
        assert of_run.subject.name == of_batch.subject.name
        assert of_run.train == of_batch.train

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("class_nuon: dog", "subject.yaml: unknown setting class_nuon; did you mean class_noun?"),
            ("{class_noun: dog, class_noun: cat}", "subject.yaml: 'class_noun' is there twice"),
            ("{class_noun: dog, subject: {class_noun: cat}}", "subject.class_noun is given twice"),
            ("dog", "should hold settings such as 'class_noun: dog'"),
            ("class_noun: no", 'subject.class_noun: YAML reads no as false; quote it: "no"'),
        ],
    )
    def test_what_is_wrong_with_it(self, write: Write, content: str, message: str) -> None:
        write("photos/rex/subject.yaml", content)
        write("photos/rex/1.png", "")
        assert message in refused("run", "--images", "photos/rex", "--dry-run")
        listed = read_batch("photos")
        assert message in "\n".join(listed[0].faults)
