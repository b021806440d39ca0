"""A family is named in its own file alone: nothing else asks which one it has."""

import re
from pathlib import Path

import diffusers
import pytest

import dreambooth
from dreambooth.models import process
from dreambooth.models.families import FAMILIES

ROOT = Path(dreambooth.__file__).parents[1]
OWN = ("dreambooth/models/families", "dreambooth/miniature/pretraining")  # the miniature's trainer is of its family
ASKED = re.compile(r"(?:isinstance|issubclass)\((?:[^()]|\([^()]*\))*\)|\btype\([^()]*\) (?:is|==|in|not)[^\n:]*")


def others() -> list[Path]:
    files = [path for room in ("dreambooth", "pipelines") for path in (ROOT / room).rglob("*.py")]
    found = [path for path in files if not path.relative_to(ROOT).as_posix().startswith(OWN)]
    assert len(found) > 150
    return found


def classes() -> set[str]:
    """Classes of families, noise processes, pipelines and denoisers."""
    named = {family.pipeline_class for family in FAMILIES} | {family.denoiser.kind for family in FAMILIES}
    lines = [getattr(diffusers, name).__mro__ for name in named] + [type(family).__mro__ for family in FAMILIES]
    lines.append(tuple(one for one in vars(process).values() if getattr(one, "__module__", "") == process.__name__))
    kinds = {kind for line in lines for kind in line if isinstance(kind, type)}
    return {kind.__name__ for kind in kinds if kind.__module__.startswith(("diffusers.", "dreambooth."))}


def test_no_other_file_names_a_family() -> None:
    kinds = {family.denoiser.kind for family in FAMILIES}
    names = {type(family).__name__ for family in FAMILIES} | {family.pipeline_class for family in FAMILIES} | kinds
    words = {re.split(r"[ ,.-]", family.name)[0] for family in FAMILIES} - {"Stable"}  # the paper's own is cited
    full = {re.escape(family.name) for family in FAMILIES}
    named = re.compile(rf"\b({'|'.join(sorted(names | words | full))})\b")
    assert [
        f"{path.relative_to(ROOT)}: {found[1]}" for path in others() if (found := named.search(path.read_text()))
    ] == []


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("if isinstance(process, RectifiedFlow):", True),
        ("if isinstance(self.process(base), Diffusion | None):", True),
        ("if type(family) is Flux:", True),
        ("if isinstance(error, OSError): return Diffusion", False),
    ],
)
def test_the_pattern_finds_a_question(text: str, asked: bool) -> None:
    assert bool(questions(text)) is asked


def questions(text: str) -> list[str]:
    """Questions of a program's text whether something is of one of those classes."""
    named = re.compile(rf"\b({'|'.join(sorted(classes()))})\b")
    return [asked[0] for asked in ASKED.finditer(text) if named.search(asked[0])]


def test_no_other_file_asks_for_a_class_of_a_family() -> None:
    assert {"Flux", "RectifiedFlow", "SuperResolution", "DiffusionPipeline", "UNet2DConditionModel"} < classes()
    found = {path.relative_to(ROOT).as_posix(): questions(path.read_text()) for path in others()}
    assert {path: asked for path, asked in found.items() if asked} == {}
