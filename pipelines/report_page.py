"""The pages of runs and batches: self-contained, readable on a phone, and without a script but for sorting tables."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from PIL import Image, ImageOps

_PAGE = Path(__file__).with_name("report_page.html")
_SMALL = 128  # pixels of a side, up to which a picture's pixels are shown as they are
_POINTS = 160
_CURVES = (("loss", "total"), ("instance_loss", "instance"), ("prior_loss", "prior"))


def render_page(title: str, *parts: str) -> str:
    """A page of parts that are HTML already; the title is text."""
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(title), body="\n".join(filter(None, parts))
    )


def section(title: str, *parts: str) -> str:
    """A part with a heading; nothing where its parts are empty."""
    inner = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{inner}</section>" if inner else ""


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """(what, value) rows."""
    return f"<dl>{''.join(f'<dt>{escape(what)}</dt><dd>{escape(value)}</dd>' for what, value in rows)}</dl>"


def note(text: str) -> str:
    """A sentence in small print."""
    return f'<p class="note">{escape(text)}</p>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, foot: Sequence[str] = ()) -> str:
    """A table that sorts by any column; `rows` and `foot` are of cells that `cell` and `number` made."""
    head = "".join(f"<th tabindex=0>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    last = f"<tfoot><tr>{''.join(foot)}</tr></tfoot>" if foot else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>{last}</table></div>'


def cell(text: str, *, kind: str = "") -> str:
    """A cell of text."""
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


def number(value: float | None, digits: int, *, more: str = "") -> str:
    """A cell that sorts as a number, with `more` behind it; a dash where there is none."""
    if value is None:
        return "<td class=n>–</td>"
    behind = f' <span class="interval">{escape(more)}</span>' if more else ""
    return f'<td class=n data-v="{value}">{value:.{digits}f}{behind}</td>'


def picture(content: bytes, *, side: int, alt: str, kind: str = "") -> str:
    """A picture of up to `side` pixels, inside the page; small ones keep their pixels sharp."""
    with Image.open(io.BytesIO(content)) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    image.thumbnail((side, 10 * side))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=80)
    classes = " ".join(filter(None, (kind, "small" if max(image.size) <= _SMALL else "")))
    source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    marked = f' class="{classes}"' if classes else ""
    return f'<img{marked} loading="lazy" alt="{escape(alt)}" src="{source}">'


def loss_curve(history: Sequence[Mapping[str, float]]) -> str:
    """Losses over steps, every point the mean of its share of the steps, since single steps are mostly noise."""
    if len(history) < 2:
        return ""
    width, height = 320, 90
    size = max(1, -(-len(history) // _POINTS))
    chunks = [history[start : start + size] for start in range(0, len(history), size)]
    series = {key: [sum(step[key] for step in chunk) / len(chunk) for chunk in chunks] for key, _ in _CURVES}
    highest = max(max(values) for values in series.values()) or 1.0
    lines = []
    for key, title in _CURVES:
        points = " ".join(
            f"{width * index / max(1, len(chunks) - 1):.1f},{height * (1 - value / highest):.1f}"
            for index, value in enumerate(series[key])
        )
        lines.append(f'<polyline class="{title}" points="{points}"><title>{title} loss</title></polyline>')
    legend = " ".join(f'<span class="{title}">{title}</span>' for _, title in _CURVES)
    return (
        f'<svg viewBox="0 -4 {width} {height + 8}" role="img" aria-label="loss curve">{"".join(lines)}</svg>'
        f'<p class="legend">{legend} loss over {int(history[-1]["step"])} steps, up to {highest:.2f}</p>'
    )
