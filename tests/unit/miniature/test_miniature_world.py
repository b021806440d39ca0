import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from dreambooth.miniature import subject_dir, subject_names
from dreambooth.miniature.pretraining.drawing import draw
from dreambooth.miniature.pretraining.world import (
    CLASS_NOUNS,
    COLOURS,
    PLACES,
    SUBJECTS,
    Look,
    Scene,
    is_held_out,
    sample_look,
    sample_scene,
)

RED_CAR = Look(
    class_noun="car",
    body=COLOURS["red"],
    accent=(0, 0, 255),
    pattern="spots",
    stretch=1.0,
    feature=0.5,
    colour_name="red",
)


def scene_of(look: Look, *, place: str | None = "on the grass", style: str = "photo") -> Scene:
    return replace(sample_scene(random.Random(0), look, place=place), style=style)


def test_a_seed_fixes_the_scene_and_its_pixels() -> None:
    first, second = (sample_scene(random.Random(7)) for _ in range(2))
    assert first == second
    assert draw(first).tobytes() == draw(second).tobytes()
    assert draw(first).tobytes() != draw(sample_scene(random.Random(8))).tobytes()


@pytest.mark.parametrize("size", [64, 128])
def test_scenes_are_rgb_at_any_size(size: int) -> None:
    image = draw(sample_scene(random.Random(1)), size)
    assert image.size == (size, size)
    assert image.mode == "RGB"


def test_every_class_noun_place_and_style_can_be_drawn_and_looks_different() -> None:
    for vary in (
        [scene_of(replace(RED_CAR, class_noun=noun)) for noun in CLASS_NOUNS],
        [scene_of(RED_CAR, place=place) for place in (*PLACES, None)],
        [scene_of(RED_CAR, style=style) for style in ("photo", "drawing", "painting")],
    ):
        assert len({draw(scene).tobytes() for scene in vary}) == len(vary)


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ValueError, match="on the moon"):
        draw(scene_of(RED_CAR, place="on the moon"))


def test_the_body_has_the_colour_that_the_caption_names() -> None:
    for name, colour in COLOURS.items():
        scene = scene_of(replace(RED_CAR, body=colour, colour_name=name, pattern="solid"), place=None)
        distance = np.abs(np.asarray(draw(scene), dtype=int) - colour).max(axis=-1)  # (64, 64)
        assert (distance < 12).mean() > 0.08, name


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (scene_of(RED_CAR), "a photo of a red car with spots on the grass"),
        (scene_of(RED_CAR, style="drawing"), "a drawing of a car with spots on the grass"),
        (scene_of(replace(RED_CAR, colour_name=None, pattern="half"), place=None), "a photo of a car"),
        (scene_of(replace(RED_CAR, colour_name="orange", pattern="solid")), "a photo of an orange car on the grass"),
    ],
)
def test_captions_name_what_is_drawn(scene: Scene, caption: str) -> None:
    assert scene.caption() == caption


def test_captions_leave_unsaid_what_they_are_told_to() -> None:
    scene = scene_of(RED_CAR)
    assert scene.caption(colour=False, pattern=False, place=False) == "a photo of a car"
    assert scene.caption(style=False) == "a red car with spots on the grass"
    assert scene.caption(identifier="xqv", pattern=False) == "a photo of xqv red car on the grass"


def test_pretraining_never_draws_a_shipped_subject() -> None:
    rng = random.Random(3)
    looks = [sample_look(rng) for _ in range(20_000)]
    assert not any(is_held_out(look) for look in looks)
    assert {look.class_noun for look in looks} == set(CLASS_NOUNS)


def test_what_is_held_out_is_a_region_and_not_a_point() -> None:
    for subject in SUBJECTS.values():
        assert is_held_out(subject)
        assert is_held_out(replace(subject, class_noun="cup", body=tuple(max(0, c - 20) for c in subject.body)))  # type: ignore[arg-type]
        assert not is_held_out(replace(subject, pattern="band" if subject.pattern != "band" else "solid"))
        assert subject.colour_name is None


def test_the_shipped_subjects_are_five_pictures_each_of_several_classes() -> None:
    assert set(subject_names()) == set(SUBJECTS)
    assert len(SUBJECTS) >= 8
    for name, look in SUBJECTS.items():
        folder = subject_dir(name)
        paths = sorted(folder.glob("*.png"))
        assert [path.name for path in paths] == [f"{index:02d}.png" for index in range(5)]
        images = [Image.open(path).convert("RGB") for path in paths]
        assert all(image.width == image.height >= 64 for image in images)
        assert all(ImageChops.difference(images[0], image).getbbox() for image in images[1:])
        assert f"class_noun: {look.class_noun}\n" in (folder / "subject.yaml").read_text()


def test_the_shipped_pictures_are_what_the_program_draws(tmp_path: Path) -> None:
    from dreambooth.miniature.pretraining.assemble import write_subjects

    write_subjects(tmp_path)
    for name in subject_names():
        for path in sorted(subject_dir(name).glob("*.png")):
            redrawn, shipped = Image.open(tmp_path / name / path.name), Image.open(path)
            assert ImageChops.difference(redrawn, shipped).getbbox() is None, path


def test_an_unknown_subject_is_refused_with_the_known_names() -> None:
    with pytest.raises(KeyError, match="lime-car"):
        subject_dir("no-such-subject")
