"""Render pages from Jinja2 templates, with tables and pictures.

Pages are self-contained: pictures embedded as WebP, charts drawn by uPlot (MIT, inlined), nothing fetched.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageOps

_TEMPLATES = Path(__file__).with_name("templates")
_SMALL = 128  # pixels of a side, up to which a picture's pixels are shown as they are


def render(template: str, **context: Any) -> str:
    """Render a template; data is escaped."""
    return _environment().get_template(template).render(context)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["asset"] = lambda name: Markup((_TEMPLATES / name).read_text(encoding="utf-8"))
    return environment


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as a data URL, of so many pixels; those of `small` ones are shown as they are."""

    source: str
    alt: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        """Whether its pixels are shown as they are."""
        return max(self.width, self.height) <= _SMALL


def picture(content: bytes, *, side: int, alt: str) -> Picture:
    """A picture of up to `side` pixels in width, upright, as WebP."""
    with Image.open(io.BytesIO(content)) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    image.thumbnail((side, 10 * side))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=80)
    source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(source=source, alt=alt, width=image.width, height=image.height)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A table's cell: text, small print after it, a link and a picture before it. With `value` it sorts by that.

    `kind` is its class; n aligns numbers on the right.
    """

    text: str
    kind: str = ""
    value: float | None = None
    more: str = ""
    link: str | None = None
    picture: Picture | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns, rows of cells whose first is their heading, and a last row exempt from sorting."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    foot: Sequence[Cell] = ()


def cell(text: str, *, kind: str = "", value: float | None = None) -> Cell:
    """A cell of text; `kind` is its class, `value` its place in sorting."""
    return Cell(text=text, kind=kind, value=value)


def number(value: float | None, digits: int, *, more: str = "") -> Cell:
    """A cell with a number and `more` in small print; a dash for None, which sorts last."""
    text = "–" if value is None else f"{value:,.{digits}f}"
    return Cell(text=text, kind="n", value=value, more="" if value is None else more)
