"""Which bucket a micro batch has and which images come up in it: by pairs' numbers alone, and all equally often."""

from collections import Counter
from itertools import product

import pytest
import torch

from dreambooth.data.batches import ImageSet, TrainingData, pairs_of
from dreambooth.data.latents import LatentCache
from dreambooth.data.order import turn_of
from dreambooth.models.families.stable_diffusion import StableDiffusion
from dreambooth.models.process import Diffusion

BUCKETS = [(3, 1, 4), (5,), (1, 1), (2, 7), (1, 2, 3, 5)]
SQUARE = (4, 8, 8)
SHAPES = (SQUARE, (4, 6, 10), (4, 10, 6))


def turns(pairs: range, counts: tuple[int, ...], micro: int, *, seed: int = 0) -> list[tuple[int, int]]:
    return [turn_of(seed, 0, pair, counts, micro) for pair in pairs]


@pytest.mark.parametrize("micro", [1, 2, 3, 8])
@pytest.mark.parametrize("counts", BUCKETS)
class TestOrder:
    def test_a_micro_batch_is_of_one_bucket(self, counts: tuple[int, ...], micro: int) -> None:
        for start in range(0, 40 * micro, micro):
            assert len({bucket for bucket, _ in turns(range(start, start + micro), counts, micro)}) == 1

    def test_every_turn_comes_up_equally_often_in_every_round(self, counts: tuple[int, ...], micro: int) -> None:
        """Exactly, not on average: as often as a micro batch has pairs."""
        everything = {(bucket, turn): micro for bucket, count in enumerate(counts) for turn in range(count)}
        size = sum(counts) * micro
        for start in (0, size, 17 * size):
            assert Counter(turns(range(start, start + size), counts, micro)) == everything

    def test_within_a_bucket_no_image_comes_up_again_before_all_others(
        self, counts: tuple[int, ...], micro: int
    ) -> None:
        seen: dict[int, list[int]] = {bucket: [] for bucket in range(len(counts))}
        for bucket, turn in turns(range(sum(counts) * micro * 3), counts, micro):
            seen[bucket].append(turn)
        for bucket, count in enumerate(counts):
            order = seen[bucket]
            assert len(order) == 3 * micro * count
            for start in range(0, len(order), count):
                assert sorted(order[start : start + count]) == list(range(count))


def test_one_bucket_has_the_order_of_no_buckets_for_any_micro_batch() -> None:
    plain = turns(range(100), (7,), 1)
    assert all(turns(range(100), (7,), micro) == plain for micro in (2, 3, 16))


def test_seeds_and_halves_and_rounds_are_ordered_apart() -> None:
    counts = (3, 2, 4)
    orders = [tuple(turns(range(start, start + 18), counts, 2, seed=seed)) for seed in (0, 1) for start in (0, 18, 36)]
    orders.append(tuple(turn_of(0, 1, pair, counts, 2) for pair in range(18)))
    assert len(set(orders)) == 7
    assert len({tuple(bucket for bucket, _ in order) for order in orders}) > 4


def images(shape: tuple[int, ...], count: int, first: int, repeats: tuple[int, ...] = ()) -> ImageSet:
    """Images whose latents, masks and conditions say which they are."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)
    mean = numbers[:, None, None, None].expand(-1, *shape)
    return ImageSet(
        latents=LatentCache(mean=mean, std=torch.zeros_like(mean)),
        text={"ids": numbers[:, None]},
        conditions={"size": numbers[:, None]},
        repeats=repeats,
        masks=mean[:, :1],
    )


def training_data(*, micro: int = 1, class_: bool = True, repeats: tuple[int, ...] = ()) -> TrainingData:
    """Three images of one size, one of another and two of a third; class images are square."""
    return TrainingData(
        family=StableDiffusion(),
        process=Diffusion(alphas_cumprod=torch.linspace(1, 0, 1000)),
        instance=images(SHAPES[0], 3, 10, repeats),
        other_sizes=(images(SHAPES[1], 1, 20), images(SHAPES[2], 2, 30)),
        class_=images(SQUARE, 4, 1000) if class_ else None,
        micro_batch_size=micro,
        seed=0,
    )


class TestBatches:
    @pytest.mark.parametrize("micro", [1, 3])
    def test_halves_are_apart_and_each_has_its_own(self, micro: int) -> None:
        data, seen = training_data(micro=micro), set()
        for start in range(0, 18 * micro, micro):
            batch = data.batch(range(start, start + micro))
            assert batch.class_half is not None
            seen.add(tuple(batch.latents.shape[1:]))
            assert batch.latents.shape == batch.noise.shape
            assert batch.class_half.latents.shape == batch.class_half.noise.shape == (micro, *SQUARE)
            assert batch.mask is not None
            assert batch.class_half.mask is None
            for half, mask in ((batch, batch.mask), (batch.class_half, None)):
                numbers = half.latents[:, 0, 0, 0]
                assert len(half.timesteps) == micro
                assert torch.equal(half.text["ids"][:, 0], numbers)
                assert torch.equal(half.conditions["size"][:, 0], numbers)
                assert mask is None or torch.equal(mask, half.latents[:, :1])
        assert seen == set(SHAPES)

    def test_square_photographs_are_apart_too_where_others_are_not_square(self) -> None:
        """Every worker calls a sharded denoiser equally often."""
        batches = [training_data().batch(range(pair, pair + 1)) for pair in range(6)]
        assert {tuple(batch.latents.shape[1:]) for batch in batches} == set(SHAPES)
        assert all(batch.class_half is not None for batch in batches)

    def test_the_class_half_is_what_it_is_without_buckets(self) -> None:
        data = training_data(micro=2)
        plain = TrainingData(
            family=data.family, process=data.process, instance=data.instance, class_=data.class_, seed=0
        )
        for start in range(0, 40, 2):
            apart, together = (one.batch(range(start, start + 2)) for one in (data, plain))
            assert apart.class_half is not None
            for name in ("latents", "noise", "timesteps"):
                assert torch.equal(getattr(apart.class_half, name), getattr(together, name)[2:])

    def test_without_class_images(self) -> None:
        batch = training_data(class_=False, micro=2).batch(range(2))
        assert batch.class_half is None
        assert len(batch.latents) == 2

    def test_workers_and_accumulation_only_decide_who_computes_them(self) -> None:
        """So a cluster may shrink and grow in the middle of a run, and resuming needs only the step."""

        def step(number: int, *, workers: int) -> list[torch.Tensor]:
            data = training_data(micro=2)
            return [
                data.batch(
                    pairs_of(
                        number,
                        micro_step,
                        rank,
                        micro_batch_size=2,
                        accumulation=4 // workers,
                        world_size=workers,
                    )
                ).noise
                for micro_step, rank in product(range(4 // workers), range(workers))
            ]

        for number in (0, 1, 9):
            alone = step(number, workers=1)
            for workers in (2, 4):
                assert all(torch.equal(a, b) for a, b in zip(alone, step(number, workers=workers), strict=True))

    def test_repeats_count_in_every_bucket(self) -> None:
        data = training_data(class_=False, micro=2, repeats=(1, 3, 1))
        seen: Counter[float] = Counter()
        for start in range(0, 16, 2):  # eight turns, two pairs each
            seen.update(data.batch(range(start, start + 2)).latents[:, 0, 0, 0].tolist())
        assert seen == {10: 2, 11: 6, 12: 2, 20: 2, 30: 2, 31: 2}

    def test_pairs_of_two_micro_batches_that_differ_in_size(self) -> None:
        with pytest.raises(ValueError, match="aren't of one micro batch of 2, nor of one size"):
            training_data(micro=2).batch(range(12))

    def test_what_is_made_of_each_tensor(self) -> None:
        names: list[str] = []
        batch = training_data().batch(range(1))
        doubled = batch.mapped(lambda name, part: names.append(name) or 2 * part)
        assert len(names) == len(set(names)) == 11
        assert "class latents" in names
        assert doubled.class_half is not None
        assert batch.class_half is not None
        assert torch.equal(doubled.class_half.latents, 2 * batch.class_half.latents)
