"""A family is named in its own file alone: nothing else asks which one it has."""

import re
from pathlib import Path

import dreambooth
from dreambooth.models.families import FAMILIES

ROOT = Path(dreambooth.__file__).parents[1]
OWN = ("dreambooth/models/families", "dreambooth/miniature/pretraining")  # the miniature's trainer is of its family


def test_no_other_file_names_a_family() -> None:
    kinds = {part.kind for family in FAMILIES for part in family.components if part.role == "denoiser"}
    names = {type(family).__name__ for family in FAMILIES} | {family.pipeline_class for family in FAMILIES} | kinds
    named = re.compile(rf"\b({'|'.join(sorted(names))})\b")
    files = [path for room in ("dreambooth", "pipelines") for path in (ROOT / room).rglob("*.py")]
    others = [path for path in files if not path.relative_to(ROOT).as_posix().startswith(OWN)]
    assert len(others) > 150
    assert [
        f"{path.relative_to(ROOT)}: {found[1]}" for path in others if (found := named.search(path.read_text()))
    ] == []
