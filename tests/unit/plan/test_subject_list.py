"""Reading the subjects of a batch: every kind of table, and every mistake in one."""

import json
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.errors import InputError
from pipelines.plan.subject_list import read_batch

YAML = """
train: {max_train_steps: 7}
subjects:
  - {name: rex, class_noun: dog, instance_images: photos/rex, identifier: sks}
  - {name: mug, class_noun: cup, instance_images: [a.jpg, /b.jpg], train.learning_rate: 0.5}
"""
CSV = """name, class_noun, instance_images, identifier, train.max_train_steps
rex, dog, photos/rex, sks, 7
mug, cup, a.jpg; b.jpg,,
"""


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str, str], str]:
    def write(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    return write


@pytest.fixture
def memory() -> fsspec.AbstractFileSystem:
    fs = fsspec.filesystem("memory")
    for path in fs.ls("/", detail=False):  # of other tests: it is one for the whole process
        fs.rm(path, recursive=True)
    return fs


def refusal(address: str) -> str:
    with pytest.raises(InputError) as caught:
        read_batch(address)
    return str(caught.value)


def configs_of(address: str, overrides: tuple[str, ...] = ()) -> list[DreamBoothConfig]:
    subjects = read_batch(address, overrides)
    assert not [subject.faults for subject in subjects if subject.faults]
    return [subject.config for subject in subjects if subject.config is not None]


def faults(address: str, *overrides: str) -> dict[str, str]:
    return {subject.name: "\n".join(subject.faults) for subject in read_batch(address, overrides) if subject.faults}


def test_yaml_with_settings_of_all_and_of_one(table: Callable[[str, str], str], tmp_path: Path) -> None:
    rex, mug = configs_of(table("s.yaml", YAML), ("storage.root=elsewhere",))
    assert (rex.subject.name, rex.subject.class_noun, rex.subject.identifier) == ("rex", "dog", "sks")
    assert rex.subject.instance_images == (str(tmp_path / "photos" / "rex"),)
    assert mug.subject.instance_images == (str(tmp_path / "a.jpg"), "/b.jpg")
    assert (rex.train.max_train_steps, mug.train.max_train_steps) == (7, 7)
    assert (rex.train.learning_rate, mug.train.learning_rate) == (5e-4, 0.5)
    assert rex.run_uri == "elsewhere/rex"


def test_csv(table: Callable[[str, str], str], tmp_path: Path) -> None:
    rex, mug = configs_of(table("s.csv", CSV))
    assert (rex.subject.identifier, rex.train.max_train_steps) == ("sks", 7)
    assert mug.subject.instance_images == (str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg"))
    assert mug.subject.identifier is None
    assert mug.train.max_train_steps != 7


def test_jsonl_and_overrides_over_all(table: Callable[[str, str], str]) -> None:
    rows = [{"name": name, "class_noun": "dog", "instance_images": f"s3://b/{name}"} for name in ("rex", "fido")]
    content = "\n".join(json.dumps(row | {"train": {"max_train_steps": 3}}) for row in rows)
    configs = configs_of(table("s.jsonl", content), ("train.max_train_steps=9",))
    assert [config.subject.instance_images for config in configs] == [("s3://b/rex",), ("s3://b/fido",)]
    assert [config.train.max_train_steps for config in configs] == [9, 9]


def test_a_folder_of_folders_at_any_address(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/photos/rex/1.png", b"")
    memory.pipe_file("/photos/rex/subject.yaml", b"{class_noun: dog, identifier: sks}")
    memory.pipe_file("/photos/mug/1.png", b"")
    memory.pipe_file("/photos/mug/subject.yaml", b"{name: my-mug, class_noun: cup, train: {max_train_steps: 2}}")
    mug, rex = configs_of("memory://photos")
    assert (mug.subject.name, mug.train.max_train_steps) == ("my-mug", 2)
    assert (rex.subject.name, rex.subject.identifier) == ("rex", "sks")
    assert rex.subject.instance_images[0].startswith("memory://")
    assert rex.subject.instance_images[0].endswith("photos/rex")


@pytest.mark.parametrize(
    ("said", "command"), [(None, " --class-noun NOUN'"), (b"class_noun: dog", "'")], ids=["unknown", "known"]
)
def test_one_subjects_folder_is_sent_to_run(
    memory: fsspec.AbstractFileSystem, said: bytes | None, command: str
) -> None:
    for name in ("1.png", "2.jpg", "notes.md"):
        memory.pipe_file(f"/photos/my dog/{name}", b"")
    if said is not None:
        memory.pipe_file("/photos/my dog/subject.yaml", said)
    message = refusal("memory://photos/my dog")
    assert "holds 2 pictures and no folder" in message
    assert f"'dreambooth run --images 'memory://photos/my dog'{command}" in message


def test_a_table_in_memory_starts_from_its_own_folder(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/tables/s.csv", b"name,class_noun,instance_images\nrex,dog,rex\n")
    [rex] = configs_of("memory://tables/s.csv")
    assert rex.subject.instance_images == ("memory://tables/rex",)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("s.yaml", "subjects: []", "holds no subject"),
        ("s.yaml", "subjects: {", "not valid YAML"),
        ("s.yaml", "rex", "expected a list of subjects"),
        (
            "s.csv",
            "name,instance_images\nrex,rex\n",
            "column 'class_noun' is missing; it has name, instance_images",
        ),
        ("s.csv", "name,class_noun,instance_images\n", "holds no subject"),
        ("s.csv", "name,class_noun,instance_images\nrex,dog,a,b\n", "line 2 has more cells"),
        (
            "s.csv",
            "name,class_noun,instance_images,train.seed\nrex,dog,a,[\n",
            "line 2: train.seed is '[', which is no value",
        ),
        ("s.jsonl", '{"name": "rex"}\n{"name"\n', "line 2 is not JSON"),
        ("s.jsonl", "[1]\n", "line 1: expected"),
        ("s.txt", "rex", ".yaml, .jsonl or .csv"),
    ],
)
def test_mistakes_in_tables(table: Callable[[str, str], str], name: str, content: str, expected: str) -> None:
    assert expected in refusal(table(name, content))


def rows(*subjects: str) -> str:
    return "\n".join(f"- {{class_noun: dog, instance_images: x, {subject}}}" for subject in subjects)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (rows("name: ../up"), {"../up": "subject.name: a subject name becomes part of paths"}),
        (rows("name: a/b"), {"a/b": "subject.name: a subject name becomes part of paths"}),
        (rows("name: rex", "name: rex"), {"rex": "the name 'rex' is taken 2 times"}),
        (rows("name: rex", "name: Rex"), {"rex": "the name 'rex' is taken 2 times (upper and lower case count as the"}),
        (
            rows("name: a, identifier: sks", "name: b, identifier: SKS"),
            {"a": "the identifier 'sks' is taken 2 times", "b": "the identifier 'SKS' is taken 2 times"},
        ),
        (rows("name: rex, train.max_trian_steps: 3"), {"rex": "unknown setting train.max_trian_steps; did you mean"}),
        (rows("{}").replace("{}", "identifier: sks"), {"subject 1": "subject.name is missing"}),
        (
            rows("name: a, storage.run: same", "name: b, storage.run: same"),
            {"a": "the folder 'same' is taken 2 times", "b": "give every subject its own"},
        ),
        (
            rows("name: a, tracking.registered_model_name: pet", "name: b, tracking.registered_model_name: pet"),
            {"a": "the registered model 'pet' is taken 2 times", "b": "give every subject its own"},
        ),
    ],
)
def test_mistakes_of_subjects_are_told_of_the_subject(
    table: Callable[[str, str], str], content: str, expected: dict[str, str]
) -> None:
    found = faults(table("s.yaml", content))
    assert all(message in found[name] for name, message in expected.items()), found


def test_all_mistakes_are_told_at_once_and_the_others_go_on(table: Callable[[str, str], str]) -> None:
    address = table("s.yaml", rows("name: ../up", "name: rex", "name: rex", "name: b, trian: {}", "name: good"))
    found = faults(address)
    assert set(found) == {"../up", "rex", "b"}
    assert "unknown setting trian" in found["b"]
    assert [subject.config is not None for subject in read_batch(address) if not subject.faults] == [True]


def test_a_mistake_in_the_settings_of_all_is_told_once(table: Callable[[str, str], str]) -> None:
    listed = "\n".join(f"  {row}" for row in rows("name: a", "name: b", "name: c").splitlines())
    told = refusal(table("s.yaml", f"cluster: {{max_lanes: 2}}\nsubjects:\n{listed}"))
    assert told == "in all 3 subjects: unknown setting cluster.max_lanes; did you mean cluster.lanes?"


def test_settings_of_all_that_no_two_can_share(table: Callable[[str, str], str]) -> None:
    found = faults(table("s.yaml", rows("name: a", "name: b")), "storage.run=one-place")
    assert found["a"] == found["b"]
    assert "the folder 'one-place' is taken 2 times" in found["a"]


def test_folders_give_names_that_paths_and_models_can_hold(memory: fsspec.AbstractFileSystem) -> None:
    for folder in ("My Dog (2)", "Rex", "rex", "ふわ"):
        memory.pipe_file(f"/photos/{folder}/1.png", b"")
    found = faults("memory://photos", "subject.class_noun=dog")
    assert set(found) == {"rex", "ふわ"}
    assert "the name 'rex' is taken 2 times" in found["rex"]
    assert "subject.name" in found["ふわ"]
    assert [subject.name for subject in read_batch("memory://photos") if subject.name not in found] == ["my-dog-2"]


def test_a_subject_without_a_class_noun_is_told_where_to_put_it(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/photos/rex/1.png", b"")
    assert "is missing; give it as in class_noun: dog, in the subject's row" in faults("memory://photos")["rex"]


def test_a_table_as_a_spreadsheet_writes_it(table: Callable[[str, str], str], tmp_path: Path) -> None:
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbfname,class_noun,instance_images\r\nrex,dog,photos/*.jpg\r\n")
    [rex] = configs_of(str(tmp_path / "bom.csv"))
    assert (rex.subject.name, rex.subject.instance_images) == ("rex", (f"{tmp_path}/photos/*.jpg",))


def test_a_folder_without_folders_is_an_empty_batch(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/photos/notes.md", b"")
    memory.pipe_file("/photos/.trash/1.png", b"")
    assert "memory://photos holds no subject" in refusal("memory://photos")


def test_a_subject_file_that_is_none(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/photos/rex/subject.yaml", b"{class_noun: ")
    assert "rex/subject.yaml is not valid YAML" in faults("memory://photos")["rex"]
    memory.pipe_file("/photos/rex/subject.yaml", b"dog")
    assert (
        "rex/subject.yaml should hold settings such as 'class_noun: dog', got 'dog'" in faults("memory://photos")["rex"]
    )


def test_an_address_that_is_not_there(tmp_path: Path) -> None:
    assert "there is nothing at" in refusal(str(tmp_path / "none.yaml"))
    assert "can't be used" in refusal("nothing://a/s.yaml")
