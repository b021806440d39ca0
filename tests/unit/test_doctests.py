"""The examples in docstrings are true."""

import doctest
import importlib
from pathlib import Path

import pytest

import dreambooth

ROOT = Path(dreambooth.__file__).parents[1]
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("dreambooth", "pipelines")
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0


def test_examples_in_the_documentation() -> None:
    results = doctest.testfile(str(ROOT / "docs" / "metrics.md"), module_relative=False)
    assert results.attempted > 0
    assert results.failed == 0
