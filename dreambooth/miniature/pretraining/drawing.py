"""Pictures of scenes, drawn from plain shapes: in under a millisecond at 64 x 64 pixels, and at any size."""

import random

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from dreambooth.miniature.pretraining.shapes import draw_subject
from dreambooth.miniature.pretraining.world import PLACES, Colour, Scene, jittered


def draw(scene: Scene, size: int = 64) -> Image.Image:
    """The scene as an RGB picture of size x size pixels, anti-aliased."""
    supersampling = 3
    canvas = Image.new("RGB", (size * supersampling, size * supersampling))
    rng = random.Random(scene.seed)
    _draw_place(canvas, scene.place, rng)
    draw_subject(canvas, scene, rng)
    image = canvas.reduce(supersampling)
    if scene.style == "drawing":
        edges = ImageOps.invert(image.filter(ImageFilter.FIND_EDGES).convert("L"))
        edges = ImageOps.autocontrast(edges, cutoff=2)
        ImageDraw.Draw(edges).rectangle((0, 0, size - 1, size - 1), outline=255, width=max(1, size // 48))
        image = Image.merge("RGB", (edges, edges, edges))
    elif scene.style == "painting":
        image = ImageOps.posterize(image.filter(ImageFilter.ModeFilter(5 if size < 128 else 9)), 3)
        image = ImageChops.add(image, Image.new("RGB", image.size, (16, 16, 16)))
    return image


def _draw_place(canvas: Image.Image, place: str | None, rng: random.Random) -> None:
    pen = ImageDraw.Draw(canvas)
    full = canvas.width

    def box(left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        pen.rectangle((left * full, top * full, right * full, bottom * full), fill=colour)

    def disc(x: float, y: float, radius: float, colour: Colour) -> None:
        pen.ellipse(((x - radius) * full, (y - radius) * full, (x + radius) * full, (y + radius) * full), fill=colour)

    def ground(sky: Colour, earth: Colour, horizon: float) -> float:
        line = horizon + rng.uniform(-0.05, 0.05)
        box(0, 0, 1, line, jittered(rng, sky, 8))
        box(0, line, 1, 1, jittered(rng, earth, 8))
        return line

    if place is None:
        level = rng.randint(196, 236)
        box(0, 0, 1, 1, jittered(rng, (level, level, level), 10))
    elif place == "on the grass":
        line = ground((140, 205, 255), (84, 184, 66), 0.58)
        for _ in range(26):
            x, y = rng.random(), rng.uniform(line + 0.03, 1)
            pen.line(
                (x * full, y * full, (x + 0.01) * full, (y - 0.05) * full), fill=(44, 130, 40), width=max(1, full // 90)
            )
    elif place == "on the beach":
        line = ground((150, 220, 255), (244, 220, 150), 0.62)
        box(0, line - 0.2, 1, line, (30, 120, 205))
        disc(rng.uniform(0.12, 0.88), 0.13, 0.085, (255, 226, 60))
    elif place == "in the snow":
        ground((172, 188, 210), (244, 248, 255), 0.55)
        for _ in range(34):
            disc(rng.random(), rng.random(), rng.uniform(0.008, 0.016), (255, 255, 255))
    elif place == "at night":
        ground((16, 18, 62), (34, 34, 44), 0.7)
        for _ in range(22):
            disc(rng.random(), rng.uniform(0, 0.6), 0.008, (240, 240, 255))
        disc(rng.uniform(0.12, 0.88), 0.14, 0.09, (246, 244, 214))
    elif place == "in the desert":
        line = ground((255, 214, 140), (222, 142, 70), 0.55)
        pen.pieslice((-0.2 * full, (line - 0.1) * full, 0.7 * full, (line + 0.3) * full), 180, 360, fill=(222, 142, 70))
        x = rng.choice((rng.uniform(0.06, 0.12), rng.uniform(0.88, 0.94)))
        box(x - 0.025, line - 0.3, x + 0.025, line + 0.08, (60, 130, 60))
        box(x - 0.09, line - 0.16, x, line - 0.11, (60, 130, 60))
        box(x - 0.09, line - 0.24, x - 0.05, line - 0.11, (60, 130, 60))
    elif place == "in the forest":
        line = ground((44, 104, 62), (66, 78, 32), 0.66)
        for column in range(5):
            x = (column + rng.uniform(0.2, 0.8)) / 5
            box(x - 0.035, 0, x + 0.035, line + rng.uniform(0, 0.06), (84, 50, 30))
    elif place == "on a red carpet":
        ground((222, 210, 188), (176, 18, 38), 0.56)
    elif place == "on a table":
        line = ground((236, 228, 214), (146, 92, 50), 0.6)
        for row in range(1, 5):
            y = line + (1 - line) * row / 5
            pen.line((0, y * full, full, y * full), fill=(108, 64, 32), width=max(1, full // 70))
    elif place == "in the water":
        ground((176, 226, 250), (28, 96, 196), 0.36)
        for _ in range(14):
            x, y = rng.uniform(-0.1, 0.95), rng.uniform(0.42, 0.98)
            pen.line((x * full, y * full, (x + 0.14) * full, y * full), fill=(120, 186, 240), width=max(1, full // 70))
    elif place == "in the city":
        line = ground((196, 204, 214), (92, 94, 100), 0.7)
        x = -rng.uniform(0, 0.1)
        while x < 1:
            width, top = rng.uniform(0.16, 0.24), rng.uniform(0.06, 0.36)
            box(x, top, x + width, line, jittered(rng, (128, 132, 148), 14))
            for row in range(4):
                for column in range(2):
                    left, upper = x + width * (0.2 + 0.42 * column), top + 0.05 + 0.11 * row
                    box(left, upper, left + width * 0.2, upper + 0.05, (250, 232, 150))
            x += width + 0.02
        pen.line((0, 0.9 * full, full, 0.9 * full), fill=(230, 230, 220), width=max(1, full // 50))
    else:
        raise ValueError(f"no place is called {place!r}; there are {', '.join(PLACES)} and None")
