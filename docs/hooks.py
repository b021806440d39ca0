"""What mkdocs adds to these pages: the command line and the public Python names, as the code has them."""

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import click

_OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./(?!tutorials/)([A-Za-z]+/[^)]*|[A-Z]+\.md)\)")
_EMPTY_HEAD = re.compile(r"<th([^>]*)></th>")


def on_files(files: Any, *, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "commands.md", content=commands_page()))
    files.append(File.generated(config, "names.md", content=names_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name files beside docs/ instead of linking to them: the site has these pages alone."""
    return _OUTSIDE.sub(lambda link: link[1] if link[2] in link[1] else f"{link[1]} (`{link[2]}`)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Make empty heads of tables plain cells: a head without words is a fault to screen readers."""
    return _EMPTY_HEAD.sub(r"<td\1></td>", html)


def commands_page() -> str:
    """Every command with its arguments and options."""
    from pipelines.cli import main

    head = "# Command line\n\nThe text of `dreambooth COMMAND --help`, for every command.\n"
    return "\n".join([head, *_commands(main, ("dreambooth",))])


def names_page() -> str:
    """Every public name of both packages, with its signature and docstring."""
    parts = ["# Python names\n\nThese names change only as [semantic versioning](https://semver.org) says.\n"]
    for package in ("dreambooth", "pipelines"):
        parts.append(f"## {package}\n")
        parts += [f"::: {package}.{name}\n" for name in import_module(package).__all__]
    return "\n".join(parts)


def _commands(command: click.Command, path: tuple[str, ...]) -> Iterator[str]:
    if isinstance(command, click.Group):
        for name, below in sorted(command.commands.items()):
            yield from _commands(below, (*path, name))
        return
    context = click.Context(command, info_name=" ".join(path), max_content_width=80, terminal_width=80)
    yield f"## {' '.join(path[1:])}\n\n```text\n{command.get_help(context)}\n```\n"
