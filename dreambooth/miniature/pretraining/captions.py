"""Scenes with captions, as the CLIP and the UNet are trained on them, and which caption is true of which scene."""

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dreambooth.miniature.pretraining.tokenizer import rare_words
from dreambooth.miniature.pretraining.world import (
    CLASS_NOUNS,
    COLOURS,
    PATTERN_PHRASES,
    PLACES,
    Look,
    Scene,
    sample_scene,
)

RARE_RATE = 0.01
GROUP = 8


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A caption and what it says: None is unsaid."""

    text: str
    style: str | None
    colour: str | None
    class_noun: str
    pattern: str | None
    place: str | None

    def is_true_of(self, scene: Scene) -> bool:
        """Whether the scene shows all that the caption says."""
        colour = None if scene.style == "drawing" else scene.look.colour_name
        shown = (scene.style, colour, scene.look.class_noun, scene.look.pattern, scene.place)
        said = (self.style, self.colour, self.class_noun, self.pattern, self.place)
        return all(word is None or word == fact for word, fact in zip(said, shown, strict=True))


def sample_caption(rng: random.Random, scene: Scene) -> Caption:
    """Describe a scene, mostly in full; about one caption in a hundred has a rare word before its class noun."""
    style = scene.style != "photo" or rng.random() < 0.85
    colour, pattern, place = rng.random() < 0.85, rng.random() < 0.5, rng.random() < 0.85
    identifier = rng.choice(rare_words()) if rng.random() < RARE_RATE else ""
    text = scene.caption(style=style, colour=colour, pattern=pattern, place=place, identifier=identifier)
    return Caption(
        text=text,
        style=scene.style if style else None,
        colour=scene.look.colour_name if colour and scene.style != "drawing" else None,
        class_noun=scene.look.class_noun,
        pattern=scene.look.pattern if pattern and scene.look.pattern in PATTERN_PHRASES else None,
        place=scene.place if place else None,
    )


def sample_group(rng: random.Random) -> list[Scene]:
    """Hard negatives: eight scenes that differ only in class noun, in body colour or in place (and always in pose)."""
    first = sample_scene(rng)
    kind = rng.choices(("class", "colour", "place"), weights=(5, 2, 1))[0]  # class nouns are the hardest to tell apart
    if kind == "colour" and first.look.colour_name is None:
        kind = "class"
    scenes = []
    for word in rng.sample({"class": CLASS_NOUNS, "colour": tuple(COLOURS), "place": PLACES}[kind], GROUP):
        posed = replace(sample_scene(rng, first.look), place=first.place, style=first.style)
        if kind == "class":
            scenes.append(replace(posed, look=replace(first.look, class_noun=word)))
        elif kind == "colour":
            scenes.append(replace(posed, look=_recoloured(first.look, word)))
        else:
            scenes.append(replace(posed, place=word))
    return scenes


def _recoloured(look: Look, colour_name: str) -> Look:
    return replace(look, body=COLOURS[colour_name], colour_name=colour_name)


def prompt(class_noun: str, colour: str, place: str) -> str:
    """A prompt that names all three, e.g. 'a photo of a red dog on the beach'."""
    return f"a photo of {'an' if colour == 'orange' else 'a'} {colour} {class_noun} {place}"


def held_out_prompts() -> tuple[tuple[str, str, str], ...]:
    """The 100 of 1000 (class noun, colour, place) that the denoiser is never shown: any two of the three occur once."""
    return tuple(
        (class_noun, colour, place)
        for c, class_noun in enumerate(CLASS_NOUNS)
        for k, colour in enumerate(COLOURS)
        for p, place in enumerate(PLACES)
        if (c + 3 * k + 7 * p) % 10 == 0
    )


def is_held_out_prompt(scene: Scene) -> bool:
    """Whether the scene is of a held-out class noun, colour and place."""
    return (scene.look.class_noun, scene.look.colour_name, scene.place) in _HELD_OUT_PROMPTS


_HELD_OUT_PROMPTS = frozenset(held_out_prompts())


def truth(captions: list[Caption], scenes: list[Scene]) -> Tensor:
    """A (captions, scenes) float tensor: 1 where the caption is true of the scene."""
    return torch.tensor([[float(caption.is_true_of(scene)) for scene in scenes] for caption in captions])
