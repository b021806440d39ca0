"""Draw the contact sheet and the loss curve."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipelines.report.charts import running_mean

CELL = 128  # pixels of a small image's side on the sheet, at least
LARGEST_CELL = 256
GAP = 8
GUTTER = 32  # between the base model's samples and the fine-tuned one's
MARGIN = 24
INK = "#1b1f24"
FAINT = "#6a737d"
RULE = "#e1e4e8"
COLUMNS = 6  # in a row, before a line break


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One strip of a contact sheet: a title and images; `baseline` images, the base model's, are on the left."""

    title: str
    images: Sequence[Image.Image]
    baseline: Sequence[Image.Image] = ()


def contact_sheet(
    rows: Sequence[Row],
    *,
    title: str = "",
    subtitle: str = "",
    baseline_title: str = "base model",
    images_title: str = "fine-tuned",
) -> Image.Image:
    """Draw rows of images on white, in cells of one size.

    Small images are enlarged with sharp pixels, large ones shrunk. Raises ValueError without any image.
    """
    sizes = [max(image.size) for row in rows for image in (*row.images, *row.baseline)]
    if not sizes:
        raise ValueError("a contact sheet needs at least one image, got none")
    cell = _cell(max(sizes))
    compared = [row for row in rows if row.baseline]
    alone = max((min(len(row.images), 2 * COLUMNS) for row in rows if not row.baseline), default=0)
    left = max((min(len(row.baseline), COLUMNS) for row in compared), default=0)
    right = max((min(len(row.images), COLUMNS) for row in compared), default=0)
    right_at = MARGIN + _span(left, cell) + GUTTER
    wide = max(MARGIN + _span(alone, cell), right_at + _span(right, cell) if compared else 0, MARGIN + 3 * CELL)
    sheet = Image.new("RGB", (wide + MARGIN, _height(rows, cell, title, subtitle)), "white")
    pen = ImageDraw.Draw(sheet)
    y = MARGIN
    if title:
        pen.text((MARGIN, y), _fit(title, _font(22, bold=True), wide - MARGIN), INK, _font(22, bold=True))
        y += 32
    if subtitle:
        pen.text((MARGIN, y), _fit(subtitle, _font(15), wide - MARGIN), FAINT, _font(15))
        y += 26
    for row in rows:
        pen.line((MARGIN, y + 6, wide, y + 6), RULE)
        pen.text((MARGIN, y + 14), _fit(row.title, _font(16, bold=True), wide - MARGIN), INK, _font(16, bold=True))
        y += 40
        if row.baseline:
            pen.text((MARGIN, y), baseline_title, FAINT, _font(13))
            pen.text((right_at, y), images_title, FAINT, _font(13))
            y += 20
            _strip(sheet, row.baseline, MARGIN, y, cell, COLUMNS)
            _strip(sheet, row.images, right_at, y, cell, COLUMNS)
        else:
            _strip(sheet, row.images, MARGIN, y, cell, 2 * COLUMNS)
        y += _strips_height(row, cell) + GAP
    return sheet


def loss_curve(history: Sequence[Mapping[str, float]]) -> Image.Image:
    """Draw losses and learning rates against steps.

    Each point is a training step's metrics: `step`, and any of `total`, `instance`, `prior`, `learning_rate` and
    `text_encoder_learning_rate`; curves that are zero throughout are left out.
    Each step draws its own timesteps, so losses are noisy; a running mean is drawn over them.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 5.4), dpi=120, layout="constrained")
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for key, (label, colour) in _LOSSES.items():
            steps, values = _series(history, key)
            losses.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
            losses.plot(steps, running_mean(values), color=colour, linewidth=1.8, label=label if steps else None)
        for key, (label, colour) in _RATES.items():
            steps, values = _series(history, key)
            rates.plot(steps, values, color=colour, linewidth=1.6, label=label if steps else None)
        losses.set_ylabel("loss")
        rates.set_ylabel("learning rate")
        rates.set_xlabel("step")
        rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        for axes, room in ((losses, 1.15), (rates, 1.5)):
            axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * room)  # for the legend
            axes.grid(visible=True, color=RULE, linewidth=0.8)
            axes.set_axisbelow(True)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, loc="upper right", ncols=3)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")  # a bare Figure draws with Agg
    with Image.open(buffer) as drawn:
        return drawn.convert("RGB")


_LOSSES = {
    "loss": ("total", "#1f77b4"),
    "instance_loss": ("instance", "#2ca02c"),
    "prior_loss": ("prior", "#d1701f"),
}
_RATES = {
    "learning_rate": ("denoiser", "#1f77b4"),
    "text_encoder_learning_rate": ("text encoder", "#8a5fb4"),
}


def _series(history: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    points = [(point["step"], point[key]) for point in history if key in point]
    if not any(value for _, value in points):
        return [], []
    return [step for step, _ in points], [value for _, value in points]


def _cell(largest: int) -> int:
    """Side of a cell: a whole multiple of small images, for even pixels."""
    if largest < CELL:
        return largest * -(-CELL // largest)
    return min(largest, LARGEST_CELL)


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    """An image scaled to fit its cell, centred."""
    image = image.convert("RGB")
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if image.size != size:
        image = image.resize(size, Image.Resampling.NEAREST if scale.is_integer() else Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (cell, cell), "white")
    canvas.paste(image, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return canvas


def _strip(sheet: Image.Image, images: Sequence[Image.Image], x: int, y: int, cell: int, columns: int) -> None:
    for index, image in enumerate(images):
        at = (x + index % columns * (cell + GAP), y + index // columns * (cell + GAP))
        sheet.paste(_fitted(image, cell), at)


def _strips_height(row: Row, cell: int) -> int:
    columns = COLUMNS if row.baseline else 2 * COLUMNS
    lines = -(-max(len(row.images), len(row.baseline), 1) // columns)
    return lines * (cell + GAP)


def _height(rows: Sequence[Row], cell: int, title: str, subtitle: str) -> int:
    head = (32 if title else 0) + (26 if subtitle else 0)
    return 2 * MARGIN + head + sum(40 + (20 if row.baseline else 0) + _strips_height(row, cell) + GAP for row in rows)


def _span(count: int, cell: int) -> int:
    return count * cell + max(0, count - 1) * GAP


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib ships DejaVu, which covers the likely scripts of identifiers.
    import matplotlib as mpl

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", name), size)


def _fit(text: str, font: ImageFont.FreeTypeFont, wide: int) -> str:
    """A text, shortened with an ellipsis to fit."""
    if font.getlength(text) <= wide:
        return text
    while text and font.getlength(f"{text}…") > wide:
        text = text[:-1]
    return f"{text.rstrip()}…"
