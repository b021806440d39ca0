"""The miniature's world: what can be in a scene, what pretraining is shown of it, and what captions say of it.

A `Look` is what a subject is (class noun, two colours, pattern, proportions); a `Scene` puts a look in a place, a pose
and a style. drawing.py makes pictures of scenes:

>>> scene = sample_scene(random.Random(7))
>>> scene.caption()
'a photo of a yellow dog on a red carpet'
>>> from dreambooth.miniature.pretraining.drawing import draw
>>> draw(scene).size
(64, 64)
"""

import colorsys
import math
import random
from dataclasses import dataclass

Colour = tuple[int, int, int]

CLASS_NOUNS = ("dog", "cat", "bird", "fish", "car", "cup", "backpack", "clock", "teapot", "boat")
COLOURS: dict[str, Colour] = {
    "red": (222, 28, 32),
    "orange": (252, 132, 16),
    "yellow": (250, 218, 36),
    "green": (34, 160, 52),
    "turquoise": (50, 208, 200),
    "blue": (34, 72, 222),
    "purple": (124, 42, 184),
    "pink": (250, 136, 190),
    "brown": (118, 68, 32),
    "white": (246, 246, 246),
}
PLACES = (
    "on the grass",
    "on the beach",
    "in the snow",
    "at night",
    "in the desert",
    "in the forest",
    "on a red carpet",
    "on a table",
    "in the water",
    "in the city",
)
PATTERNS = ("solid", "spots", "stripes", "band", "half")
PATTERN_PHRASES = {"spots": "with spots", "stripes": "with stripes", "band": "with a band"}
STYLES = ("photo", "drawing", "painting")

HELD_OUT_RADIUS = 70.0
"""Two colours nearer than this (Euclidean, 8-bit RGB) count as one where subjects are held out of pretraining."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What makes a subject itself. `colour_name` is None for a body colour that captions have no word for."""

    class_noun: str
    body: Colour
    accent: Colour
    pattern: str
    stretch: float
    """Width over height, against the class's usual one: 0.8 to 1.25."""
    feature: float
    """Size of the class's own feature (ears, handle, sail, cabin), 0 to 1."""
    colour_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A look in a place (None: a plain backdrop), in a pose, in a style. `seed` fixes what is left to chance."""

    look: Look
    place: str | None
    style: str
    mirror: bool
    tilt: float
    """Degrees, counterclockwise."""
    scale: float
    offset: tuple[float, float]
    """Where the middle of the subject stands off the usual spot, in picture widths."""
    seed: int

    def caption(
        self, *, style: bool = True, colour: bool = True, pattern: bool = True, place: bool = True, identifier: str = ""
    ) -> str:
        """The scene in words, e.g. 'a photo of a red car with spots on the grass'.

        Each of the four can be left unsaid; colours are never said of a drawing, which has none. With an `identifier`
        the class noun has no article, as in DreamBooth's 'a photo of [V] car'.
        """
        named = self.look.colour_name if colour and self.style != "drawing" else None
        words = [
            f"a {self.style} of" if style or self.style != "photo" else None,
            identifier or ("an" if named == "orange" else "a"),
            named,
            self.look.class_noun,
            PATTERN_PHRASES.get(self.look.pattern) if pattern else None,
            self.place if place else None,
        ]
        return " ".join(word for word in words if word)


# The shipped subjects: pairs of colours that captions have no words for, in any pattern. Looks near them are held out
# of everything that is pretrained.
SUBJECTS: dict[str, Look] = {
    "lime-car": Look(
        class_noun="car", body=(164, 230, 40), accent=(200, 30, 150), pattern="half", stretch=0.86, feature=0.9
    ),
    "coral-car": Look(
        class_noun="car", body=(255, 112, 96), accent=(20, 70, 110), pattern="stripes", stretch=1.18, feature=0.2
    ),
    "mint-dog": Look(
        class_noun="dog", body=(140, 240, 176), accent=(110, 30, 90), pattern="spots", stretch=1.1, feature=0.95
    ),
    "navy-dog": Look(
        class_noun="dog", body=(28, 34, 110), accent=(255, 176, 60), pattern="half", stretch=0.88, feature=0.4
    ),
    "magenta-cat": Look(
        class_noun="cat", body=(226, 24, 150), accent=(250, 232, 120), pattern="stripes", stretch=1.12, feature=0.8
    ),
    "teal-bird": Look(
        class_noun="bird", body=(0, 122, 124), accent=(255, 120, 110), pattern="band", stretch=1.15, feature=0.9
    ),
    "violet-teapot": Look(
        class_noun="teapot", body=(176, 132, 250), accent=(60, 110, 30), pattern="spots", stretch=1.15, feature=0.8
    ),
    "olive-backpack": Look(
        class_noun="backpack", body=(128, 136, 24), accent=(255, 150, 210), pattern="stripes", stretch=0.88, feature=0.9
    ),
    "crimson-clock": Look(
        class_noun="clock", body=(150, 10, 70), accent=(120, 240, 220), pattern="half", stretch=1.1, feature=0.9
    ),
    "sky-boat": Look(
        class_noun="boat", body=(110, 180, 255), accent=(150, 80, 0), pattern="spots", stretch=0.9, feature=0.9
    ),
}


def is_held_out(look: Look) -> bool:
    """Whether pretraining must never draw this look: a shipped subject's pattern and nearly its colours."""
    return any(
        look.pattern == subject.pattern
        and math.dist(look.body, subject.body) < HELD_OUT_RADIUS
        and math.dist(look.accent, subject.accent) < HELD_OUT_RADIUS
        for subject in SUBJECTS.values()
    )


def sample_look(rng: random.Random, class_noun: str | None = None) -> Look:
    """Draw a look for pretraining: never a held-out one; seven in ten have a body colour that captions can name."""
    while True:
        look = _any_look(rng, class_noun)
        if not is_held_out(look):
            return look


def _any_look(rng: random.Random, class_noun: str | None) -> Look:
    if rng.random() < 0.7:
        name: str | None = rng.choice(tuple(COLOURS))
        body = jittered(rng, COLOURS[str(name)], 12)
    else:
        name, body = None, _any_colour(rng)
    accent = _any_colour(rng)
    while math.dist(accent, body) < 110:  # otherwise a pattern could not be seen
        accent = _any_colour(rng)
    return Look(
        class_noun=class_noun or rng.choice(CLASS_NOUNS),
        body=body,
        accent=accent,
        pattern=rng.choices(PATTERNS, weights=(40, 17, 17, 13, 13))[0],
        stretch=rng.uniform(0.82, 1.22),
        feature=rng.random(),
        colour_name=name,
    )


def sample_scene(
    rng: random.Random, look: Look | None = None, *, place: str | None = "any", photo: bool = False
) -> Scene:
    """Put a look (a sampled one by default) into a sampled scene. `place` fixes the place; `photo` fixes the style."""
    return Scene(
        look=look or sample_look(rng),
        place=rng.choice((*PLACES, None)) if place == "any" else place,
        style="photo" if photo else rng.choices(STYLES, weights=(92, 4, 4))[0],
        mirror=rng.random() < 0.5,
        tilt=rng.uniform(-8, 8),
        scale=rng.uniform(0.8, 1.08),
        offset=(rng.uniform(-0.1, 0.1), rng.uniform(-0.05, 0.05)),
        seed=rng.getrandbits(32),
    )


def _any_colour(rng: random.Random) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.35, 1.0), rng.uniform(0.4, 1.0))
    return int(red * 255), int(green * 255), int(blue * 255)


def jittered(rng: random.Random, colour: Colour, by: int) -> Colour:
    """A colour with each channel moved by up to `by`."""
    red, green, blue = (max(0, min(255, channel + rng.randint(-by, by))) for channel in colour)
    return red, green, blue
