"""The licence of a base model, as its own model card states it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dreambooth.miniature import BASES
from dreambooth.models.download import is_hub_id

CARD = "README.md"
_METADATA = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Licence:
    """A licence by the hub's identifier (`other` for one without), its own name, and an address of its text."""

    id: str
    name: str | None = None
    link: str | None = None


def licence_of(address: str, directory: Path) -> Licence | None:
    """The licence of the base model at an address whose files lie in `directory`; None if no card there states it."""
    if address in BASES:
        return Licence(id="apache-2.0")  # this package's own
    stated = _metadata(directory / CARD)
    licences = stated.get("license")
    licence = licences[0] if isinstance(licences, list) and licences else licences
    if not isinstance(licence, str):
        return None
    name, link = (stated.get(f"license_{what}") for what in ("name", "link"))
    return Licence(
        id=licence,
        name=name if isinstance(name, str) else None,
        link=_absolute(link, address) if isinstance(link, str) else None,
    )


def _metadata(path: Path) -> dict[str, Any]:
    """The YAML at the head of a card; empty where there is none, as any text may lie under this name."""
    try:
        found = _METADATA.match(path.read_text(encoding="utf-8"))
        stated = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return stated if isinstance(stated, dict) else {}


def _absolute(link: str, address: str) -> str | None:
    """A link that holds outside of its repository; None for one into a folder that others don't have."""
    if link.startswith(("https://", "http://")):
        return link
    return f"https://huggingface.co/{address}/blob/main/{link.removeprefix('./')}" if is_hub_id(address) else None
