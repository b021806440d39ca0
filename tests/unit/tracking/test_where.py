"""Conditions on registered models: what they mean, and what is refused with the names that there are."""

import pytest

from dreambooth.errors import InputError
from pipelines.tracking.where import parse_where

TEXTS = ("subject", "class_noun", "base_model")
NUMBERS = {"version", "miniature/clip_t", "miniature/dino", "paper/dino", "similarity/identifier"}
REX: dict[str, str | float] = {"subject": "rex and max", "class_noun": "dog", "version": 3.0, "miniature/clip_t": 0.31}


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ("clip_t > 0.3", True),
        ("clip_t>=.31", True),
        ("miniature/clip_t < 0.31", False),
        ("paper/dino > 0", False),  # it has none
        ("paper/dino != 7", False),
        ("version = 3", True),
        ("class_noun = dog", True),
        ("class_noun != 'dog'", False),
        ("subject = 'rex and max'", True),
        ("subject = rex and max", True),
        ("subject = rex and max AND clip_t > 0.3  and version <= 3e0", True),
        ("class_noun = dog and clip_t > 0.4", False),
    ],
)
def test_what_holds(where: str, holds: bool) -> None:
    assert all(one.holds(REX) for one in parse_where(where, texts=TEXTS, numbers=NUMBERS)) is holds


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("dino > 0.5", "dino may be miniature/dino or paper/dino, which can't be compared; name one of them"),
        (
            "clip_i > 0.5",
            "no model has 'clip_i'; there are base_model, class_noun, subject, and of numbers miniature/cl",
        ),
        ("subject > rex", "subject is text; compare it with = or !="),
        ("clip_t > high", "miniature/clip_t is a number, and 'high' isn't"),
        ("clip_t", "'clip_t' isn't a condition; expected NAME, one of <= >= != < > =, and a value"),
        ("clip_t > 0.3 or dino > 1", "'0.3 or dino' isn't|isn't a condition"),
        ("", "'' isn't a condition"),
        ("__import__('os').system('true') = 1", "isn't a condition"),
        ("clip_t > nan and", "is a number, and 'nan and' isn't"),
    ],
)
def test_what_is_refused(where: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        parse_where(where, texts=TEXTS, numbers=NUMBERS)
