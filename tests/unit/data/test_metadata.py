"""Captions in a folder's metadata.jsonl or metadata.csv, on a disk and in a store alike."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from gradients import gradient

from dreambooth.data.images import find_instance_images, search_images
from dreambooth.errors import InputError

Place = Callable[..., str]


@pytest.fixture(params=["on a disk", "in a store"])
def place(request: pytest.FixtureRequest, folder: Path, memory: fsspec.AbstractFileSystem) -> Place:
    """A function that lays files down beside three photographs, and gives the address of their folder."""

    def lay(**files: str | bytes) -> str:
        out = io.BytesIO()
        gradient(16, 16).save(out, "PNG")
        contents: dict[str, bytes] = dict.fromkeys(("a.png", "b.png", "c d.png"), out.getvalue())
        for name, content in files.items():
            contents[name.replace("_", ".")] = content.encode() if isinstance(content, str) else content
        if request.param == "in a store":
            memory.pipe({f"/rex/{name}": content for name, content in contents.items()})
            return "memory:///rex"
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        return str(folder)

    return lay


def captions(address: str) -> list[str | None]:
    return [image.caption for image in find_instance_images((address,))]


def jsonl(*rows: dict[str, object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refused(address: str) -> str:
    with pytest.raises(InputError) as caught:
        find_instance_images((address,))
    return str(caught.value)


class TestReading:
    def test_lines_of_json(self, place: Place) -> None:
        rows = jsonl(
            {"file_name": "c d.png", "text": "[V]  dog,\nasleep", "boxes": [1, 2]}, {"file_name": "a.png", "text": "é"}
        )
        found = search_images((place(metadata_jsonl=rows),))
        assert [image.caption for image in found.images] == ["é", None, "[V] dog, asleep"]
        assert found.warnings == ()

    @pytest.mark.parametrize(
        "table",
        [
            'file_name,text\na.png,"[V] dog, asleep"\nb.png,[V] awake\n',
            "\ufefffile_name;label;caption\r\na.png;1;[V] dog, asleep\r\nb.png;2;[V] awake\r\n",
            "caption\tfile_name\n[V] dog, asleep\t./a.png\n\n[V] awake\tb.png\n",
        ],
        ids=["as pandas writes it", "as a spreadsheet in Europe does", "with tabs, columns the other way round"],
    )
    def test_a_table(self, place: Place, table: str) -> None:
        assert captions(place(metadata_csv=table)) == ["[V] dog, asleep", "[V] awake", None]

    def test_one_file_or_some_of_the_folder(self, place: Place) -> None:
        address = place(metadata_csv="file_name,text\na.png,one\nb.png,two\n")
        assert captions(f"{address}/b.png") == ["two"]
        assert captions(f"{address}/[ac]*.png") == ["one", None]

    def test_both_files_and_texts_beside_them(self, place: Place) -> None:
        address = place(
            metadata_csv="file_name,text\na.png,one\n",
            metadata_jsonl=jsonl({"file_name": "b.png", "caption": "two"}),
            a_txt="one\n",
        )
        assert captions(address) == ["one", "two", None]


class TestWhatIsSaid:
    @pytest.mark.parametrize(
        ("table", "reason"),
        [
            (
                "name,text\na.png,one\n",
                "it has no column file_name, which names the pictures of its captions, but name",
            ),
            ("file_name,label\na.png,1\n", "it has no captions, which are in a column text or caption, but file_name"),
            ("", "it has no column file_name, which names the pictures of its captions, but none"),
        ],
    )
    def test_a_table_of_something_else(self, place: Place, table: str, reason: str) -> None:
        address = place(metadata_csv=table)
        found = search_images((address,))
        assert [image.caption for image in found.images] == [None] * 3
        (warning,) = found.warnings
        assert warning.startswith(f"not used of {address}: metadata.csv ({reason}")

    def test_a_table_without_a_last_line_break_may_be_cut_short(self, place: Place) -> None:
        address = place(metadata_csv="file_name,text\na.png,one\nb.png,a photo of [V] do")
        found = search_images((address,))
        assert found.warnings == (
            f"{address}/metadata.csv doesn't end with a line break; if it was cut short, so is its last row, "
            f"'b.png,a photo of [V] do'",
        )


class TestMistakes:
    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ('{"file_name": "a.png", "te', "line 1 is not JSON"),
            ('{"file_name": "a.png", "te', "the file ends there, without a line break: was it cut short?"),
            ('["a.png"]\n', 'line 1: expected {"file_name": "photo.jpg"'),
            ('{"file_name": "a.png", "text": "x", "text": "y"}\n', "line 1: 'text' is there twice"),
            ('{"file_name": "a.png", "text": "x", "caption": "y"}\n', "columns text and caption may be the caption"),
        ],
    )
    def test_of_the_file(self, place: Place, rows: str, message: str) -> None:
        address = place(metadata_jsonl=rows)
        said = refused(address)
        assert said.startswith(f"{address}/metadata.jsonl: ")
        assert message in said

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"file_name": "A.png", "text": "x"}, "it is about A.png, which isn't in ADDRESS; did you mean a.png?"),
            ({"file_name": "more/a.png", "text": "x"}, "it is about more/a.png, which isn't in ADDRESS"),
            ({"text": "x"}, "expected the name of a picture as file_name, got null"),
            ({"file_name": 3, "text": "x"}, "expected the name of a picture as file_name, got 3"),
            ({"file_name": "a.png", "text": 3}, "expected text as the text of a.png, got 3"),
            ({"file_name": "a.png", "text": " "}, "the text of a.png: expected at least one visible character"),
            ({"file_name": "a.png", "text": None}, "leave the row out for the instance prompt"),
            ({"file_name": "a.png"}, "the text of a.png: expected at least one visible character"),
            ({"file_name": "a.png", "text": "\x07"}, "the text of a.png: expected visible characters"),
            ({"file_name": "b.png", "text": "x"}, "b.png has a row already, line 1 of ADDRESS/metadata.jsonl"),
        ],
    )
    def test_of_a_row(self, place: Place, row: dict[str, object], message: str) -> None:
        address = place(metadata_jsonl=jsonl({"file_name": "b.png", "text": "fine"}, row))
        said = refused(address)
        assert said.startswith(f"line 2 of {address}/metadata.jsonl: ")
        assert message.replace("ADDRESS", address) in said

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ("file_name,text\na.png,one\nb.png", "line 3 has 1 cell, but there are 2 columns; was it cut short?"),
            ('file_name,text\na.png,one\nb.png,"a photo of', "is a quoted cell left open?"),
            ("file_name,text\na.png,[V] dog, asleep\n", "line 2 has 3 cells, but there are 2 columns; quote captions"),
            ("file_name,text,text\na.png,one,two\n", "the column 'text' is there 2 times"),
            (b"file_name,text\na.png,stra\xdfe\n", "metadata.csv is not UTF-8: line 2 holds the byte 0xDF"),
        ],
    )
    def test_of_a_table(self, place: Place, table: str | bytes, message: str) -> None:
        assert message in refused(place(metadata_csv=table))

    def test_all_are_told_at_once(self, place: Place) -> None:
        rows = jsonl(*({"file_name": f"{number}.png", "text": "x"} for number in range(12)))
        assert len(refused(place(metadata_jsonl=rows)).splitlines()) == 11

    def test_two_captions_that_differ(self, place: Place) -> None:
        address = place(metadata_csv="file_name,text\na.png,one\n", a_txt="two")
        said = refused(address)
        assert said == (
            f"{address}/a.png has two captions, 'two' in {address}/a.txt and 'one' in line 2 of "
            f"{address}/metadata.csv; leave one of them out"
        )
