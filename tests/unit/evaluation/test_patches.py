"""Masked patch similarity, against numpy and with the miniature's ViT."""

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.evaluation.banks import load_bank
from dreambooth.evaluation.encoders import Transform
from dreambooth.evaluation.patches import MaskedPhotograph, masked_patch_similarity, subject_patches

SIDE = 64


def unit(*shape: int, seed: int) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(made, dim=-1)


def scene(ground: str, *, subject_at: tuple[int, int] | None) -> Image.Image:
    """A ground with a checked square of two colours, if anywhere."""
    image = Image.new("RGB", (SIDE, SIDE), ground)
    if subject_at is not None:
        left, top = subject_at
        for row in range(3):
            for column in range(3):
                corner = (left + 8 * column, top + 8 * row)
                image.paste("crimson" if (row + column) % 2 else "gold", (*corner, corner[0] + 8, corner[1] + 8))
    return image


def mask(*box: int) -> Image.Image:
    made = Image.new("L", (SIDE, SIDE))
    made.paste(255, box)
    return made


def test_against_numpy() -> None:
    samples, subject = unit(3, 7, 5, seed=0), unit(4, 5, seed=1)
    by_hand = [
        np.mean([max(float(np.dot(own, patch)) for patch in sample) for own in subject.numpy()])
        for sample in samples.numpy()
    ]
    assert masked_patch_similarity(samples, subject).tolist() == pytest.approx(by_hand)


def test_where_a_patch_lies_and_what_lies_beside_it_changes_nothing() -> None:
    samples, subject = unit(2, 9, 5, seed=2), unit(4, 5, seed=3)
    found = masked_patch_similarity(samples, subject)
    torch.testing.assert_close(masked_patch_similarity(samples.flip(1), subject.flip(0)), found)
    assert bool((masked_patch_similarity(torch.cat([samples, unit(2, 3, 5, seed=4)], dim=1), subject) >= found).all())
    whole = torch.cat([subject.flip(0)[None], unit(1, 5, 5, seed=5)], dim=1)  # all of the subject, and more
    torch.testing.assert_close(masked_patch_similarity(whole, subject), torch.ones(1))


def test_patches_count_when_more_than_half_is_the_subjects() -> None:
    grid = subject_patches(mask(8, 0, 21, 12), 8).reshape(8, 8)  # 5 of 8 columns of the third, 4 of 8 rows below
    assert grid.nonzero().tolist() == [[0, 1], [0, 2]]
    half = Image.new("L", (SIDE, SIDE), 127)
    assert not subject_patches(half, 8).any()


def test_a_mask_is_cut_as_its_photograph_is() -> None:
    transform = Transform(resize=32, crop=16)
    picture, inside = Image.new("RGB", (128, 64), "black"), Image.new("L", (128, 64))
    picture.paste("white", (64, 0, 128, 64))
    inside.paste(255, (64, 0, 128, 64))
    assert transform.cut(picture).convert("L").tobytes() == transform.cut(inside).tobytes()
    assert transform.cut(inside).size == (16, 16)


def test_a_sample_with_the_subject_elsewhere_is_nearer_than_one_without_it() -> None:
    bank = load_bank("miniature")
    photograph = MaskedPhotograph(picture=scene("forestgreen", subject_at=(8, 8)), mask=mask(8, 8, 32, 32))
    samples = [
        scene("forestgreen", subject_at=(8, 8)),
        scene("steelblue", subject_at=(32, 32)),
        scene("steelblue", subject_at=None),
        scene("forestgreen", subject_at=None),
    ]
    same, elsewhere, without, same_ground = bank.subject_similarities(samples, [photograph])[:, 0].tolist()
    assert same == pytest.approx(1, abs=1e-5)
    assert 1 > elsewhere > max(without, same_ground)
    alone = bank.subject_similarities(samples[1:2], [photograph])[:, 0].tolist()
    assert alone == pytest.approx([elsewhere], abs=1e-5)


def test_photographs_without_a_patch_of_the_subject_are_left_out() -> None:
    bank, picture = load_bank("miniature"), scene("steelblue", subject_at=(8, 8))
    speck = MaskedPhotograph(picture=picture, mask=mask(8, 8, 11, 11))
    whole = MaskedPhotograph(picture=picture, mask=mask(8, 8, 32, 32))
    assert bank.subject_similarities([picture, picture], [speck, whole]).shape == (2, 1)
    assert bank.subject_similarities([picture], [speck]).shape == (1, 0)
