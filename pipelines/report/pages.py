"""Render pages from Jinja2 templates, with tables, pictures and charts.

Pages are self-contained: pictures embedded as WebP, charts drawn by uPlot (MIT, inlined), nothing fetched.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageOps

_TEMPLATES = Path(__file__).with_name("templates")
_SMALL = 128  # pixels of a side, up to which a picture's pixels are shown as they are
_POINTS = 160
_LOSSES = {"loss": "total", "instance_loss": "instance", "prior_loss": "prior"}


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
class Cell:
    """A table's cell. With `number` it is right-aligned and sorts by `value`, None last."""

    text: str
    number: bool = False
    value: float | None = None
    more: str = ""
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns, rows of cells, and a last row exempt from sorting."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    foot: Sequence[Cell] = ()


def cell(text: str, *, kind: str = "") -> Cell:
    """A cell of text; `kind` is its class."""
    return Cell(text=text, kind=kind)


def number(value: float | None, digits: int, *, more: str = "") -> Cell:
    """A cell with a number and `more` in small print; a dash for None."""
    text = "–" if value is None else f"{value:.{digits}f}"
    return Cell(text=text, number=True, value=value, more="" if value is None else more)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as a data URL; the pixels of `small` ones are shown as they are."""

    source: str
    alt: str
    small: bool


def picture(content: bytes, *, side: int, alt: str) -> Picture:
    """A picture of up to `side` pixels in width, upright, as WebP."""
    with Image.open(io.BytesIO(content)) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    image.thumbnail((side, 10 * side))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=80)
    source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(source=source, alt=alt, small=max(image.size) <= _SMALL)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over a common x-axis; `series` are (label, class of colour, values)."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    series: Sequence[tuple[str, str, Sequence[float]]]

    @property
    def plain(self) -> list[dict[str, Any]]:
        """The series for the page's script."""
        return [{"label": label, "kind": kind, "values": list(values)} for label, kind, values in self.series]


def loss_chart(history: Sequence[Mapping[str, float]]) -> Chart | None:
    """Losses over steps, averaged over intervals, since single steps are mostly noise.

    None for fewer than two points.
    """
    if len(history) < 2:
        return None
    size = max(1, -(-len(history) // _POINTS))
    chunks = [history[start : start + size] for start in range(0, len(history), size)]
    return Chart(
        title=f"loss over {int(history[-1]['step'])} steps",
        x_label="step",
        y_label="loss",
        x=[int(chunk[-1]["step"]) for chunk in chunks],
        series=[
            (label, label, [round(sum(step[key] for step in chunk) / len(chunk), 5) for chunk in chunks])
            for key, label in _LOSSES.items()
        ],
    )
