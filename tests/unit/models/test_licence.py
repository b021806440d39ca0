"""The licence that a base model's card states, and the cards that state none."""

from pathlib import Path

import pytest

from dreambooth.models.licence import Licence, licence_of


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: creativeml-openrail-m\ntags: [a]\n---\n# Words\n", Licence(id="creativeml-openrail-m")),
        ("---\r\nlicense: [mit, apache-2.0]\r\n---\r\n", Licence(id="mit")),
        ("---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\n---", Licence(id="other", name="x")),
        (
            "---\nlicense: other\nlicense_link: https://host/text\n---\n",
            Licence(id="other", link="https://host/text"),
        ),
        ("# A card without metadata\n\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: {a: b}\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\n: [\n---\n", None),
        ("", None),
    ],
)
def test_of_a_folder_with_a_card(text: str, licence: Licence | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert licence_of(str(tmp_path), tmp_path) == licence


def test_of_a_folder_without_a_card_and_of_a_built_in_model(tmp_path: Path) -> None:
    assert licence_of(str(tmp_path), tmp_path) is None
    (tmp_path / "README.md").write_bytes(b"\xff\xfe not text")
    assert licence_of(str(tmp_path), tmp_path) is None
    assert licence_of("miniature", tmp_path) == Licence(id="apache-2.0")
