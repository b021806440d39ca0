"""Every metric on embeddings made by hand, whose answer is known."""

import math

import pytest
import torch

from dreambooth.errors import InputError
from dreambooth.evaluation.metrics import (
    background_leak,
    clip_t,
    context_variance,
    div,
    fidelity,
    near_copies,
    nearest,
    pres,
    prompt_followed,
    prompt_similarity,
)
from dreambooth.evaluation.similarity import mean_pairwise_similarity

EAST, NORTH, WEST = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
HALF = math.sqrt(0.5)
NORTH_EAST = [HALF, HALF]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_fidelity_of_each_sample_is_over_all_real_images() -> None:
    each = fidelity(torch.tensor([EAST, NORTH, WEST]), torch.tensor([EAST, NORTH]))
    assert each.tolist() == pytest.approx([0.5, 0.5, -0.5])


def test_fidelity_has_the_mean_that_the_paper_takes_and_keeps_the_order() -> None:
    samples, real = randn(7, 5), randn(4, 5, seed=1)
    each = fidelity(samples, real)
    assert float(each.mean()) == pytest.approx(mean_pairwise_similarity(samples, real))
    assert fidelity(samples.flip(0), real.flip(0)).tolist() == pytest.approx(each.flip(0).tolist())
    one_by_one = [float(fidelity(sample[None], real)) for sample in samples]
    assert each.tolist() == pytest.approx(one_by_one)


def test_clip_t_pairs_each_image_with_its_own_prompt() -> None:
    images, texts = torch.tensor([EAST, NORTH]), torch.tensor([NORTH_EAST, WEST])
    assert prompt_similarity(images, texts).tolist() == pytest.approx([HALF, 0])
    assert clip_t(images, texts) == pytest.approx(HALF / 2)
    assert clip_t(images, texts.flip(0)) == pytest.approx((-1 + HALF) / 2)  # other pairs, another figure
    assert clip_t(images.flip(0), texts.flip(0)) == pytest.approx(clip_t(images, texts))
    assert clip_t(texts, images) == pytest.approx(clip_t(images, texts))
    assert clip_t(images * 7, texts) == pytest.approx(clip_t(images, texts))


def test_clip_t_of_one_prompt_for_all_images() -> None:
    assert clip_t(torch.tensor([EAST, NORTH]), torch.tensor(EAST)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="a prompt for each of 3 images, got 2"):
        clip_t(randn(3, 2), randn(2, 2))


def test_pres_is_the_class_prompts_likeness_to_the_subject() -> None:
    real = torch.tensor([EAST, EAST])
    assert pres(torch.tensor([EAST, EAST]), real) == pytest.approx(1)  # the class became the subject
    assert pres(torch.tensor([NORTH, WEST]), real) == pytest.approx(-0.5)


def test_div_counts_each_pair_once_and_no_sample_with_itself() -> None:
    distances = torch.tensor([[0.0, 0.1, 0.2], [0.1, 0.0, 0.6], [0.2, 0.6, 0.0]])
    assert div(distances) == pytest.approx(0.3)
    order = torch.tensor([2, 0, 1])
    assert div(distances[order][:, order]) == pytest.approx(0.3)
    assert div(torch.zeros(4, 4)) == 0


@pytest.mark.parametrize(
    ("distances", "message"),
    [
        (torch.zeros(1, 1), "at least 2 samples of a prompt, got 1; ask for more images per prompt"),
        (torch.zeros(0, 0), "at least 2 samples of a prompt, got 0"),
        (torch.zeros(2, 3), r"expected distances \(N, N\)"),
        (torch.tensor([[0.0, math.nan], [math.nan, 0.0]]), "isn't finite"),
    ],
)
def test_distances_without_a_mean(distances: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        div(distances)


def test_context_variance() -> None:
    assert context_variance([0.5, 0.7, 0.9]) == pytest.approx(0.04)
    assert context_variance([0.9, 0.5, 0.7]) == pytest.approx(0.04)
    assert context_variance([0.8, 0.8]) == 0
    with pytest.raises(InputError, match="at least 2 prompts, got 1"):
        context_variance([0.8])


def test_the_nearest_real_image() -> None:
    indices, similarities = nearest(torch.tensor([EAST, [0.1, 1.0]]), torch.tensor([WEST, NORTH, NORTH_EAST]))
    assert indices.tolist() == [2, 1]
    assert similarities.tolist() == pytest.approx([HALF, 1 / math.sqrt(1.01)])


def at(*degrees: float) -> torch.Tensor:
    """Embeddings on a circle: (N, 2)."""
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


class TestNearCopies:
    # Real images at 0 and 90 degrees differ by 1 - cos 90 = 1, so a copy is nearer than 0.3: within 45.6 degrees.
    REAL = at(0, 90)

    def test_are_near_one_photograph_on_the_scale_of_all(self) -> None:
        assert near_copies(at(0, 44, 91, 136, 180), self.REAL).tolist() == [True, True, True, False, False]
        # Photographs that are more alike leave less room: 1 - cos 30 = 0.134, so 0.040 or 16 degrees.
        assert near_copies(at(15, 47, -20), at(0, 30)).tolist() == [True, False, False]

    def test_have_to_be_near_by_distance_too_and_to_the_same_photograph(self) -> None:
        real_distances = torch.tensor([[0.0, 0.4], [0.4, 0.0]])  # a copy is nearer than 0.1
        distances = torch.tensor([[0.05, 0.4], [0.2, 0.4], [0.4, 0.05], [0.4, 0.05]])
        found = near_copies(at(5, 5, 5, 85), self.REAL, distances=distances, real_distances=real_distances)
        assert found.tolist() == [True, False, False, True]

    def test_of_one_photograph_or_a_burst_have_a_scale_that_is_given(self) -> None:
        # 0.3 x 0.1 = 0.03, which is 1 - cos of 14.07 degrees.
        assert near_copies(at(14, 15), at(0)).tolist() == [True, False]
        assert near_copies(at(14, 15.2), at(0, 1)).tolist() == [True, False]
        alone = near_copies(at(14), at(0), distances=torch.ones(1, 1), real_distances=torch.zeros(1, 1))
        assert alone.tolist() == [True]

    def test_do_not_depend_on_order_or_company(self) -> None:
        samples, real = randn(20, 2), randn(5, 2, seed=1)
        found = near_copies(samples, real)
        assert 0 < int(found.sum()) < 20
        assert torch.equal(near_copies(samples.flip(0), real.flip(0)), found.flip(0))
        assert torch.equal(torch.cat([near_copies(sample[None], real) for sample in samples]), found)

    def test_need_distances_of_the_same_images(self) -> None:
        with pytest.raises(InputError, match=r"distances \(1, 2\) between the pictures, got \(1, 3\)"):
            near_copies(at(0), self.REAL, distances=torch.zeros(1, 3), real_distances=torch.zeros(2, 2))
        with pytest.raises(InputError, match=r"distances \(2, 2\) among the real images, got \(3, 3\)"):
            near_copies(at(0), self.REAL, distances=torch.zeros(1, 2), real_distances=torch.zeros(3, 3))

    def test_of_a_burst_are_found_though_its_pictures_hardly_differ(self) -> None:
        burst, no_distance = at(0, 1), torch.zeros(2, 2)
        copied = near_copies(at(1, 60), burst, distances=torch.full((2, 2), 0.1), real_distances=no_distance)
        assert copied.tolist() == [True, False]


def test_a_prompt_is_followed_when_half_of_what_the_base_model_gains_is_left() -> None:
    text, base, others = at(0), at(60, 60), at(90, 90)  # CLIP-T 0.5 against 0 for images that ignore the prompt
    assert prompt_followed(base, base, others, text) is True
    assert prompt_followed(at(75), base, others, text) is True  # 0.259
    assert prompt_followed(at(76), base, others, text) is False  # 0.242
    assert prompt_followed(at(0), base, others, text) is True
    assert prompt_followed(at(0), others, others, text) is None  # the base model doesn't know it either


def painted(subject: list[float], background: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """A square of one colour on another, and the square's mask."""
    pixels = torch.tensor(background)[:, None, None].repeat(1, 8, 8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 2:6] = True
    pixels[:, mask] = torch.tensor(subject)[:, None]
    return pixels, mask


@pytest.mark.parametrize(
    ("subject", "leak"),
    [
        ([1.0, 0.0, 0.0], 0),  # still its own red
        ([0.0, 0.0, 1.0], 1),  # the background's blue
        ([0.5, 0.0, 0.5], 0.5),  # half-way
        ([1.0, 0.0, -0.5], -0.25),  # away from it
        ([1.0, 0.7, 0.0], 0),  # another colour, but not the background's
    ],
)
def test_colour_that_leaks_from_the_background(subject: list[float], leak: float) -> None:
    pixels, mask = painted(subject, [0.0, 0.0, 1.0])
    assert background_leak(pixels, mask, torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(leak)


def test_a_background_of_the_subjects_colour_tells_nothing() -> None:
    pixels, mask = painted([1.0, 0.0, 0.0], [0.95, 0.0, 0.0])
    assert background_leak(pixels, mask, torch.tensor([1.0, 0.0, 0.0])) is None


def test_masks_that_mark_nothing_or_do_not_fit() -> None:
    pixels, mask = painted([1.0, 0.0, 0.0], [0.0, 0.0, 1.0])
    for wrong in (torch.zeros_like(mask), torch.ones_like(mask)):
        with pytest.raises(InputError, match="both subject and background"):
            background_leak(pixels, wrong, torch.ones(3))
    with pytest.raises(InputError, match=r"got \(3, 8, 8\) and \(4, 4\)"):
        background_leak(pixels, mask[:4, :4], torch.ones(3))


def test_embeddings_of_two_encoders_are_never_compared() -> None:
    for metric in (fidelity, prompt_similarity, clip_t, nearest):
        with pytest.raises(InputError, match="width 2 and 3 can't be compared; use one encoder"):
            metric(randn(2, 2), randn(2, 3))


def test_embeddings_that_are_not_numbers_are_refused() -> None:
    broken = torch.tensor([EAST, [math.nan, 0.0]])
    for metric in (fidelity, prompt_similarity, clip_t, nearest, pres):
        with pytest.raises(ValueError, match="embedding at 1 isn't finite"):
            metric(broken, randn(2, 2))
