"""How each class noun is drawn.

Shapes are given in a subject's own coordinates: x to the right and y down, from -1 to 1, feet at y = 1.
"""

import math
import random
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

from dreambooth.miniature.pretraining.world import Colour, Look, Scene

Point = tuple[float, float]
OUTLINE: Colour = (26, 24, 30)


def draw_subject(canvas: Image.Image, scene: Scene, rng: random.Random) -> None:
    """Draw the scene's subject, posed, onto a canvas; `rng` decides the little that a look leaves open."""
    _DRAWERS[scene.look.class_noun](_Brush(canvas, scene), scene.look, rng)


class _Brush:
    """Draws shapes given in a subject's coordinates onto the canvas, posed."""

    def __init__(self, canvas: Image.Image, scene: Scene) -> None:
        self.canvas = canvas
        self.look = scene.look
        self._pen = ImageDraw.Draw(canvas)
        full = canvas.width
        angle = math.radians(scene.tilt)
        unit = 0.37 * full * scene.scale
        across = unit * math.sqrt(scene.look.stretch) * (-1 if scene.mirror else 1)
        down = unit / math.sqrt(scene.look.stretch)
        self._a, self._b = across * math.cos(angle), down * math.sin(angle)
        self._c, self._d = -across * math.sin(angle), down * math.cos(angle)
        self._x = (0.5 + scene.offset[0]) * full
        self._y = (0.56 + scene.offset[1]) * full
        self._line = max(1, round(0.011 * full))
        self._texture = self._patterned_canvas()

    def _place(self, points: Sequence[Point]) -> list[Point]:
        return [(self._x + self._a * x + self._b * y, self._y + self._c * x + self._d * y) for x, y in points]

    def shape(self, points: Sequence[Point], fill: Colour | None = None, *, outline: bool = True) -> None:
        """A filled polygon; without `fill` it has the body's colour and pattern."""
        placed = self._place(points)
        if fill is None:
            mask = Image.new("L", self.canvas.size)
            ImageDraw.Draw(mask).polygon(placed, fill=255)
            self.canvas.paste(self._texture, mask=mask)
        else:
            self._pen.polygon(placed, fill=fill)
        if outline:
            self._pen.line([*placed, placed[0], placed[1]], fill=OUTLINE, width=self._line, joint="curve")

    def oval(
        self, x: float, y: float, across: float, down: float, fill: Colour | None = None, *, outline: bool = True
    ) -> None:
        """A filled ellipse with half axes `across` and `down`."""
        self.shape(arc(x, y, across, down), fill, outline=outline)

    def stroke(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        """A thick line with an outline."""
        placed = self._place(points)
        thick = max(1, round(width * math.hypot(self._b, self._d)))
        self._pen.line(placed, fill=OUTLINE, width=thick + 2 * self._line, joint="curve")
        self._pen.line(placed, fill=fill, width=thick, joint="curve")

    def _patterned_canvas(self) -> Image.Image:
        look = self.look
        texture = Image.new("RGB", self.canvas.size, look.body)
        pen = ImageDraw.Draw(texture)
        if look.pattern == "spots":
            for row in range(-3, 4):
                for column in range(-3, 4):
                    x = 0.46 * column + (0.23 if row % 2 else 0)
                    pen.polygon(self._place(arc(x, 0.4 * row + 0.1, 0.13, 0.13, 10)), fill=look.accent)
        elif look.pattern == "stripes":
            for column in range(-3, 4):
                x = 0.4 * column
                pen.polygon(
                    self._place([(x - 0.07, -1.3), (x + 0.07, -1.3), (x + 0.07, 1.3), (x - 0.07, 1.3)]),
                    fill=look.accent,
                )
        elif look.pattern == "band":
            pen.polygon(self._place([(-1.4, 0.1), (1.4, 0.1), (1.4, 0.42), (-1.4, 0.42)]), fill=look.accent)
        elif look.pattern == "half":
            pen.polygon(self._place([(0.12, -1.4), (1.4, -1.4), (1.4, 1.4), (0.12, 1.4)]), fill=look.accent)
        return texture


def arc(
    x: float, y: float, across: float, down: float, corners: int = 22, start: float = 0, stop: float = 360
) -> list[Point]:
    """Points on an ellipse from `start` to `stop` degrees, clockwise as y points down."""
    whole = stop - start == 360
    step = (stop - start) / (corners if whole else corners - 1)
    angles = [math.radians(start + step * corner) for corner in range(corners)]
    return [(x + across * math.cos(angle), y + down * math.sin(angle)) for angle in angles]


def _shade(colour: Colour, by: float) -> Colour:
    red, green, blue = (max(0, min(255, int(channel * by))) for channel in colour)
    return red, green, blue


def _dog(brush: _Brush, look: Look, rng: random.Random) -> None:
    brush.stroke([(0.7, 0.0), (0.95, -0.5)], 0.13, look.body)
    for x in (-0.45, -0.15, 0.4, 0.66):
        brush.shape([(x - 0.1, 0.4), (x + 0.1, 0.4), (x + 0.1, 1.0), (x - 0.1, 1.0)], _shade(look.body, 0.88))
    brush.oval(0.08, 0.2, 0.72, 0.36)
    brush.oval(-0.55, -0.38, 0.4, 0.38)
    brush.oval(-0.87, -0.24, 0.24, 0.17, look.body)
    brush.oval(-1.04, -0.3, 0.08, 0.07, OUTLINE)
    length = 0.22 + 0.26 * look.feature
    brush.oval(-0.28, -0.5 + length * 0.55, 0.15, length, look.accent)
    brush.oval(-0.66, -0.46, 0.065, 0.065, OUTLINE, outline=False)


def _cat(brush: _Brush, look: Look, rng: random.Random) -> None:
    brush.stroke([(0.4, 0.85), (0.85, 0.75), (0.9, 0.2 - 0.3 * look.feature)], 0.15, look.body)
    brush.oval(0.0, 0.48, 0.5, 0.54)
    ear = 0.26 + 0.28 * look.feature
    for side in (-1, 1):
        brush.shape([(side * 0.5, -0.5), (side * 0.42, -0.72 - ear), (side * 0.06, -0.7)], look.accent)
    brush.oval(0.0, -0.38, 0.54, 0.44)
    for side in (-1, 1):
        brush.oval(side * 0.21, -0.44, 0.1, 0.12, (244, 250, 200))
        brush.oval(side * 0.21, -0.44, 0.035, 0.1, OUTLINE, outline=False)
    brush.shape([(-0.07, -0.26), (0.07, -0.26), (0.0, -0.18)], (240, 120, 140))


def _bird(brush: _Brush, look: Look, rng: random.Random) -> None:
    for x in (-0.1, 0.16):
        brush.stroke([(x, 0.5), (x, 1.0)], 0.05, (240, 150, 40))
    brush.shape([(0.4, 0.0), (1.05, -0.3), (1.0, 0.1), (0.5, 0.35)], look.body)
    brush.shape([(-0.76, -0.6), (-1.12, -0.42), (-0.74, -0.34)], (250, 160, 30))
    brush.oval(0.05, 0.15, 0.62, 0.48)
    brush.oval(-0.48, -0.46, 0.36, 0.36)
    wing = 0.22 + 0.2 * look.feature
    brush.shape([(-0.15, 0.0), (0.2, -0.1), (0.3 + wing, 0.1), (0.15, 0.12 + wing)], look.accent)
    brush.oval(-0.56, -0.52, 0.075, 0.075, (255, 255, 255), outline=False)
    brush.oval(-0.57, -0.52, 0.045, 0.045, OUTLINE, outline=False)


def _fish(brush: _Brush, look: Look, rng: random.Random) -> None:
    brush.shape([(0.5, 0.05), (1.08, -0.42), (0.94, 0.05), (1.08, 0.5)], look.accent)
    fin = 0.2 + 0.4 * look.feature
    brush.shape([(-0.25, -0.35), (0.15, -0.4 - fin), (0.4, -0.25)], look.accent)
    brush.oval(-0.15, 0.05, 0.86, 0.5)
    brush.oval(-0.62, -0.06, 0.13, 0.13, (255, 255, 255))
    brush.oval(-0.64, -0.06, 0.06, 0.06, OUTLINE, outline=False)
    brush.stroke([(-0.35, 0.1), (-0.28, 0.2), (-0.35, 0.3)], 0.02, OUTLINE)


def _car(brush: _Brush, look: Look, rng: random.Random) -> None:
    roof = -0.5 - 0.3 * look.feature
    brush.shape([(-0.62, 0.1), (-0.42, roof), (0.42, roof), (0.7, 0.1)])
    for left, right in ((-0.47, -0.06), (0.06, 0.5)):
        tilt_left, tilt_right = (0.14, 0.0) if left < 0 else (0.0, -0.16)
        brush.shape(
            [(left, 0.02), (left + tilt_left, roof + 0.14), (right + tilt_right, roof + 0.14), (right, 0.02)],
            (206, 234, 248),
        )
    brush.shape([(-1.05, 0.1), (-0.95, 0.02), (0.98, 0.02), (1.08, 0.16), (1.08, 0.62), (-1.05, 0.62)])
    for x in (-0.58, 0.58):
        brush.oval(x, 0.66, 0.29, 0.29, (38, 36, 42))
        brush.oval(x, 0.66, 0.13, 0.13, look.accent, outline=False)
    brush.oval(-0.96, 0.26, 0.08, 0.09, (255, 244, 170), outline=False)


def _cup(brush: _Brush, look: Look, rng: random.Random) -> None:
    reach = 0.26 + 0.26 * look.feature
    handle = arc(0.56, 0.12, reach, 0.42, 12, -90, 90)
    brush.stroke(handle, 0.15, look.accent)
    brush.shape([(-0.72, -0.65), (0.72, -0.65), (0.54, 0.95), (-0.54, 0.95)])
    brush.oval(0.0, -0.65, 0.72, 0.17, _shade(look.body, 0.6))


def _backpack(brush: _Brush, look: Look, rng: random.Random) -> None:
    brush.stroke(arc(0.0, -0.78, 0.26, 0.24, 10, 180, 360), 0.1, look.accent)
    for side in (-1, 1):
        brush.oval(side * 0.74, 0.42, 0.16, 0.4, _shade(look.body, 0.8))
    body = [
        *arc(-0.32, -0.4, 0.4, 0.42, 7, 180, 270),
        *arc(0.32, -0.4, 0.4, 0.42, 7, 270, 360),
        (0.74, 0.9),
        (-0.74, 0.9),
    ]
    brush.shape(body)
    brush.stroke([(-0.56, -0.2), (0.56, -0.2)], 0.03, OUTLINE)
    width = 0.26 + 0.2 * look.feature
    brush.shape([(-width, 0.3), (width, 0.3), (width, 0.76), (-width, 0.76)], look.accent)


def _clock(brush: _Brush, look: Look, rng: random.Random) -> None:
    for side in (-1, 1):
        brush.stroke([(side * 0.4, 0.6), (side * 0.62, 1.0)], 0.15, look.body)
        bell = 0.16 + 0.14 * look.feature
        brush.oval(side * 0.55, -0.76, bell + 0.04, bell, look.accent)
    brush.oval(0.0, 0.02, 0.9, 0.86)
    brush.oval(0.0, 0.02, 0.5, 0.48, (252, 250, 244))
    for length, angle in ((0.26, rng.uniform(0, 360)), (0.38, rng.uniform(0, 360))):
        x, y = math.cos(math.radians(angle)) * length, math.sin(math.radians(angle)) * length
        brush.stroke([(0.0, 0.02), (x, 0.02 + y)], 0.025, OUTLINE)


def _teapot(brush: _Brush, look: Look, rng: random.Random) -> None:
    reach = 0.2 + 0.16 * look.feature
    brush.stroke(arc(0.62, 0.2, reach + 0.08, 0.4, 12, -100, 100), 0.13, look.accent)
    brush.shape([(-0.5, 0.5), (-0.55, 0.05), (-0.85, -0.3), (-1.12, -0.32), (-0.95, 0.1), (-0.75, 0.55)], look.body)
    brush.oval(0.0, 0.3, 0.72, 0.62)
    brush.oval(0.0, -0.3, 0.4, 0.13, _shade(look.body, 0.8))
    brush.oval(0.0, -0.52, 0.13, 0.13, look.accent)


def _boat(brush: _Brush, look: Look, rng: random.Random) -> None:
    top = -0.75 - 0.3 * look.feature
    brush.stroke([(-0.05, top - 0.05), (-0.05, 0.4)], 0.05, (110, 72, 40))
    brush.shape([(0.02, top), (0.02, 0.2), (0.78, 0.2)])
    brush.shape([(-0.14, top + 0.12), (-0.14, 0.2), (-0.66, 0.2)], look.accent)
    brush.shape([(-1.06, 0.34), (1.06, 0.34), (0.7, 0.95), (-0.66, 0.95)])


_DRAWERS: dict[str, Callable[[_Brush, Look, random.Random], None]] = {
    "dog": _dog,
    "cat": _cat,
    "bird": _bird,
    "fish": _fish,
    "car": _car,
    "cup": _cup,
    "backpack": _backpack,
    "clock": _clock,
    "teapot": _teapot,
    "boat": _boat,
}
