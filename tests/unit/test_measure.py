"""One subject's figures, from embeddings made by hand."""

import json
import math

import pytest
import torch

from dreambooth.errors import InputError
from dreambooth.evaluation.banks import ImageEmbeddings
from dreambooth.evaluation.figures import BankId, Figures, column, figures_from
from dreambooth.evaluation.measure import PromptSamples, measure

BANK = BankId(name="miniature", hash="0123456789abcdef")
EAST, NORTH, WEST = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]
NORTH_EAST = [math.sqrt(0.5), math.sqrt(0.5), 0.0]
UP = [0.0, 0.0, 1.0]


def embedded(dino: list[list[float]], clip: list[list[float]] | None = None) -> ImageEmbeddings:
    return ImageEmbeddings(dino=torch.tensor(dino), clip=torch.tensor(clip if clip is not None else dino))


def of_prompt(samples: ImageEmbeddings, prompt: str = "a photo of a [V] dog", **more: object) -> PromptSamples:
    texts = {"text": torch.tensor(NORTH), "text_no_identifier": torch.tensor(EAST)}
    return PromptSamples(prompt=prompt, samples=samples, **{**texts, **more})  # type: ignore[arg-type]


def two_prompts() -> Figures:
    first = of_prompt(
        embedded([EAST, NORTH]),
        "first",
        application="recontextualization",
        base=embedded([EAST, EAST]),
        distances=torch.tensor([[0.0, 0.4], [0.4, 0.0]]),
    )
    second = of_prompt(
        embedded([WEST, UP]),
        "second",
        base=embedded([NORTH_EAST, NORTH_EAST]),
        distances=torch.tensor([[0.0, 0.2], [0.2, 0.0]]),
    )
    return measure(
        bank=BANK, prompts=[first, second], instance=embedded([EAST, NORTH_EAST]), class_samples=embedded([WEST, UP])
    )


def test_every_figure_of_two_prompts() -> None:
    figures = two_prompts()
    half = math.sqrt(0.5)
    means = {name: figure.interval.mean for name, figure in figures.figures.items()}
    first, second = (1 + half + 0 + half) / 4, (-1 - half + 0 + 0) / 4
    assert means == pytest.approx(
        {
            "dino": (first + second) / 2,
            "clip_i": (first + second) / 2,
            "clip_t": (0.5 + 0) / 2,
            "clip_t_no_identifier": (0.5 - 0.5) / 2,
            "clip_t_base": (1 + half) / 2,
            "pres": second,
            "div": 0.3,
            "real_dino": half,
            "real_clip_i": half,
            "context_variance": (first - second) ** 2 / 2,
            "near_copies": 0.25,
            "nearest_dino": (1 + half - half + 0) / 4,
        }
    )
    assert figures.unmeasured == {"background_leak": "no masks of the subject were given"}
    assert {figure.bank for figure in figures.figures.values()} == {BANK}
    assert [(pair.sample, pair.instance, pair.near_copy) for pair in figures.nearest] == [
        (0, 0, True),
        (1, 1, False),
        (2, 1, False),
        (3, 0, False),
    ]


def test_figures_can_be_stored() -> None:
    figures = two_prompts()
    assert figures_from(json.loads(json.dumps({"subject": "rex", **figures.as_dict()}))) == figures


def test_figures_of_two_banks_never_share_a_column() -> None:
    figures = two_prompts()
    other = measure(
        bank=BankId(name="paper", hash="f" * 16), prompts=[of_prompt(embedded([EAST]))], instance=embedded([EAST])
    )
    assert column("dino", [figures, figures]).mean == pytest.approx(figures.figures["dino"].interval.mean)
    with pytest.raises(InputError, match="miniature@0123456789abcdef and paper@ffffffffffffffff"):
        column("dino", [figures, other])
    with pytest.raises(InputError, match="has no figure 'pres': no samples of the class prompt"):
        column("pres", [other])
