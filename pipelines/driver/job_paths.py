"""Find the paths in a command by its options, not by the files that happen to exist here.

A job runs in its own folder on another machine. Its configuration or table travels with it. Addresses and absolute
paths (of shared disks) stay as they are. A relative path would mean something else there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dreambooth.config.overrides import leaves, parse_override, read_yaml
from dreambooth.errors import InputError
from dreambooth.miniature import BASES
from pipelines.plan.tables import SUBJECT, read_table

SWITCHES = ("--dry-run", "--verbose", "--quiet", "--skip-invalid", "--help", "-h")
"""Options of `run` and `batch` without a value."""
OPTIONS = {"--images": "subject.instance_images", "--base-model": "base_model", "--output": "storage.run"}
"""Options whose value is a path, and their settings."""
_FOLDERS = ("storage.root", "storage.run", "storage.prior", "subject.instance_images", "evaluation.real_images")
_ENCODERS = ("evaluation.image_encoder", "evaluation.dino", "evaluation.clip", "evaluation.lpips")
_MODELS = ("base_model", "super_resolution.base_model", *_ENCODERS)
"""Settings whose value is a folder, an address or a hub id."""


@dataclass(frozen=True, kw_only=True)
class Argument:
    """Part of a command: an option with its value, or the file or folder the command reads."""

    option: str
    value: str
    joined: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """The words of this part."""
        if self.joined:
            return (f"{self.option}={self.value}",)
        return tuple(word for word in (self.option, self.value) if word)

    def renamed(self, value: str) -> "Argument":
        """This part with another value."""
        return replace(self, value=value)


def split(arguments: Sequence[str]) -> Iterator[Argument]:
    """The parts of a command's arguments."""
    words = iter(arguments)
    for word in words:
        if word == "--":
            yield from (Argument(option="", value=rest) for rest in words)
        elif not word.startswith("-") or word in SWITCHES:
            yield Argument(option=word, value="") if word in SWITCHES else Argument(option="", value=word)
        elif "=" in word:
            option, _, value = word.partition("=")
            yield Argument(option=option, value=value, joined=True)
        else:
            yield Argument(option=word, value=next(words, ""))


def settings_of(argument: Argument) -> list[tuple[str, Any]]:
    """(dotted name, value) of an option's settings."""
    if argument.option in OPTIONS:
        return [(OPTIONS[argument.option], argument.value)]
    if argument.option == "--set":
        return _named(parse_override(argument.value).items())
    return []


def settings_in(command: str, path: Path) -> list[tuple[str, Any]]:
    """(dotted name, value) of the settings in a run's configuration or a batch's table."""
    if command == "run":
        return _named(read_yaml(path).items())
    common, rows = read_table(path.read_bytes(), str(path))
    settings = _named(common.items())
    for row in rows:
        settings += _named((f"subject.{key}" if key in SUBJECT else key, value) for key, value in row.settings.items())
    return settings


def check_reachable(settings: Sequence[tuple[str, Any]], where: str = "") -> None:
    """Raise InputError for a setting with a relative path, meaningless on the job's machine."""
    for name, value in settings:
        for address in value if isinstance(value, list) else [value]:
            if not isinstance(address, str) or "://" in address or address.startswith("/"):
                continue
            if name in _FOLDERS or (name in _MODELS and address not in BASES and _is_folder(address)):
                raise elsewhere(address, f"{where}{name} ", "a path")


def elsewhere(address: str, where: str = "", what: str = "a folder") -> InputError:
    """The error for a path local to this machine."""
    return InputError(
        f"{where}{address!r} is {what} here, and the job runs elsewhere; give an address that the cluster reads, such "
        f"as s3://bucket/{Path(address).name}, or, on a disk that it shares, the whole path"
    )


def _named(settings: Any) -> list[tuple[str, Any]]:
    return [(".".join(path), value) for path, value in leaves(settings)]


def _is_folder(address: str) -> bool:
    return address.startswith((".", "~")) or Path(address).is_dir()
