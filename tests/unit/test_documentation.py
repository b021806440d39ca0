"""README and docs/: links lead somewhere, commands are those there are, and every page has its place on the site."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml

import dreambooth
import pipelines
from pipelines.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def fenced(page: Path) -> Iterator[str]:
    """The lines of a page's code blocks but YAML and Python, with those that go on joined."""
    for language, block in re.findall(r"(?ms)^ *```([a-z]*)\n(.*?)^ *```", page.read_text()):
        if language not in ("yaml", "python"):
            yield from (line.strip() for line in block.replace("\\\n", " ").splitlines())


def commands(page: Path) -> list[list[str]]:
    """The words after `dreambooth` of its command lines; those with an ellipsis are no whole commands."""
    text = [re.split(r"[|>]", line.removeprefix(".venv/bin/"))[0] for line in fenced(page)]
    words = [shlex.split(line, comments=True) for line in text if line.startswith("dreambooth ")]
    return [line[1:] for line in words if not any("…" in word or word == "..." for word in line)]


def parse(command: click.Command, words: list[str], name: str = "dreambooth") -> None:
    context: Any = command.make_context(name, words)
    if isinstance(command, click.Group):
        below = command.get_command(context, words[0])
        assert below is not None, words
        parse(below, words[1:], words[0])


def test_readme_is_read_in_minutes() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 900


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_are_taken_as_they_stand_there(page: Path) -> None:
    for words in commands(page):
        parse(main, words)


def test_the_script_on_the_page_is_the_example_in_some_ten_lines() -> None:
    script = (ROOT / "examples" / "one_subject.py").read_text()
    assert f"```python\n{script}```\n" in (ROOT / "docs" / "python.md").read_text()
    assert sum(bool(line) for line in script.rpartition('"""')[2].splitlines()) <= 11


def test_there_are_many_commands() -> None:
    assert len(commands(ROOT / "README.md")) >= 6
    assert sum(len(commands(page)) for page in PAGES) > 40


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_make_has_the_targets(page: Path) -> None:
    targets = set(re.findall(r"(?m)^([a-z0-9-]+):", (ROOT / "Makefile").read_text()))
    text = page.read_text()
    named = re.findall(r"`make ([a-z0-9-]+)", text) + re.findall(r"(?m)^make ([a-z0-9-]+)", text)
    assert set(named) <= targets


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestSite:
    def test_every_page_has_a_place(self) -> None:
        def places(entry: Any) -> Iterator[str]:
            below = entry.values() if isinstance(entry, dict) else entry
            for each in [below] if isinstance(below, str) else below:
                yield from [each] if isinstance(each, str) else places(each)

        site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
        written = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
        assert sorted(places(site["nav"])) == sorted(written | {"commands.md", "names.md"})

    def test_it_has_every_command_and_option(self, hooks: ModuleType) -> None:
        page = hooks.commands_page()
        for name, command in main.commands.items():
            assert f"## {name}" in page
            assert all(option.opts[0] in page for option in command.params if isinstance(option, click.Option))
        assert max(map(len, page.splitlines())) <= 80

    def test_it_has_every_public_name(self, hooks: ModuleType) -> None:
        public = [f"{package.__name__}.{name}" for package in (dreambooth, pipelines) for name in package.__all__]
        assert re.findall(r"(?m)^::: (\S+)$", hooks.names_page()) == public

    @pytest.mark.parametrize(
        ("link", "shown"),
        [
            ("[infra/ray](../infra/ray/aws.yaml)", "infra/ray (`infra/ray/aws.yaml`)"),
            ("[infra/services](../infra/services)", "infra/services"),
            ("[SECURITY.md](../SECURITY.md)", "SECURITY.md"),
            ("[benchmarks](../benchmarks.md)", "[benchmarks](../benchmarks.md)"),
        ],
    )
    def test_files_beside_it_are_named_not_linked(self, hooks: ModuleType, link: str, shown: str) -> None:
        assert hooks.on_page_markdown(link) == shown

    def test_nothing_is_asked_of_other_hosts(self) -> None:
        assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["theme"]["font"] is False
