"""Which pair is trained on when, and what is drawn for it: the same for every split of the work."""

from itertools import product

import pytest
import torch
from torch import Tensor

from dreambooth.data.batches import Batch, ImageSet, TrainingData, pairs_of
from dreambooth.data.latents import LatentCache
from dreambooth.models.families.stable_diffusion import StableDiffusion
from dreambooth.models.process import Diffusion
from dreambooth.randomness import generator

SHAPE = (4, 8, 8)


def image_set(
    count: int,
    *,
    crops: int = 1,
    first: float = 0,
    std: float = 0.0,
    texts: int | None = None,
    repeats: tuple[int, ...] = (),
) -> ImageSet:
    """Images whose latents say which entry they are, and whose text says which image."""
    mean = torch.arange(first, first + count * crops)[:, None, None, None].expand(-1, *SHAPE)
    text = torch.arange(count if texts is None else texts)[:, None]
    latents = LatentCache(mean=mean, std=torch.full_like(mean, std))
    return ImageSet(latents=latents, text={"ids": text}, crops=crops, repeats=repeats)


NO_TEXT = -1


def training_data(
    instance: int = 5,
    class_: int | None = 7,
    *,
    seed: int = 0,
    crops: int = 1,
    std: float = 0.0,
    offset: float = 0.0,
    repeats: tuple[int, ...] = (),
    dropout: float = 0.0,
) -> TrainingData:
    return TrainingData(
        family=StableDiffusion(),
        process=Diffusion(alphas_cumprod=torch.linspace(1, 0, 1000)),
        instance=image_set(instance, crops=crops, std=std, repeats=repeats),
        class_=None if class_ is None else image_set(class_, first=1000, std=std, texts=1),
        seed=seed,
        noise_offset=offset,
        caption_dropout=dropout,
        no_text={"ids": torch.tensor([NO_TEXT])},
    )


def entries(batch: Batch) -> list[int]:
    return [int(latents[0, 0, 0]) for latents in batch.latents]


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def tensors(batch: Batch) -> list[Tensor]:
    return [batch.latents, batch.noise, batch.timesteps, batch.text["ids"]]


def merged(batches: list[Batch]) -> Batch:
    """Batches as one: all instance halves, then all class halves."""
    halves = [[part.chunk(2)[half] for part in tensors(batch)] for half in (0, 1) for batch in batches]
    latents, noise, timesteps, ids = (torch.cat(parts) for parts in zip(*halves, strict=True))
    return Batch(latents, noise, timesteps, {"ids": ids}, {})


class TestPairs:
    @pytest.mark.parametrize(
        ("micro", "accumulation", "workers"), [(1, 1, 1), (2, 1, 1), (1, 3, 2), (2, 2, 3), (3, 1, 4)]
    )
    def test_they_tile_the_global_batches(self, micro: int, accumulation: int, workers: int) -> None:
        size = micro * accumulation * workers
        for step in (0, 1, 17):
            seen = [
                pair
                for micro_step, rank in product(range(accumulation), range(workers))
                for pair in pairs_of(
                    step, micro_step, rank, micro_batch_size=micro, accumulation=accumulation, world_size=workers
                )
            ]
            assert sorted(seen) == list(range(step * size, (step + 1) * size))

    @pytest.mark.parametrize("seed", [0, 5])
    def test_workers_accumulation_and_batch_size_only_decide_who_computes_them(self, seed: int) -> None:
        data = training_data(seed=seed, std=1.0, offset=0.1)

        def batch(step: int, micro_step: int, rank: int, *, micro: int, accumulation: int, workers: int) -> Batch:
            return data.batch(
                pairs_of(step, micro_step, rank, micro_batch_size=micro, accumulation=accumulation, world_size=workers)
            )

        for step in range(6):
            whole = batch(step, 0, 0, micro=2, accumulation=1, workers=1)
            two_workers = [batch(step, 0, rank, micro=1, accumulation=1, workers=2) for rank in (0, 1)]
            two_micro_steps = [batch(step, micro_step, 0, micro=1, accumulation=2, workers=1) for micro_step in (0, 1)]
            assert same(merged(two_workers), whole)
            assert same(merged(two_micro_steps), whole)
            assert not same(*two_workers)


class TestDraws:
    def test_the_same_whoever_asks_and_whatever_was_asked_before(self) -> None:
        data = training_data(std=1.0, offset=0.1)
        together = data.batch(range(40, 44))
        assert same(merged([data.batch(range(pair, pair + 1)) for pair in range(40, 44)]), together)
        fresh = training_data(std=1.0, offset=0.1)
        fresh.batch(range(3))
        assert same(fresh.batch(range(40, 44)), together)

    def test_shapes_with_the_instance_half_first(self) -> None:
        batch = training_data().batch(range(3))
        assert batch.latents.shape == batch.noise.shape == (6, *SHAPE)
        assert batch.timesteps.shape == (6,)
        assert batch.text["ids"].shape == (6, 1)
        assert [entry >= 1000 for entry in entries(batch)] == [False] * 3 + [True] * 3

    def test_without_class_images_there_is_only_the_instance_half(self) -> None:
        with_class, without = training_data().batch(range(4)), training_data(class_=None).batch(range(4))
        for all_of_them, part in zip(tensors(with_class), tensors(without), strict=True):
            assert torch.equal(all_of_them[:4], part)

    def test_every_pair_half_and_seed_has_noise_of_its_own(self) -> None:
        noises = [noise for seed in (0, 1) for noise in training_data(seed=seed).batch(range(8)).noise]
        flat = torch.stack(noises).flatten(1)
        correlation = torch.corrcoef(flat) - torch.eye(len(flat))
        assert correlation.abs().max() < 0.35  # of 256 values each: unrelated ones stay within about 0.25

    def test_noise_is_standard_normal_and_timesteps_are_uniform(self) -> None:
        batch = training_data().batch(range(500))
        assert float(batch.noise.mean()) == pytest.approx(0, abs=0.01)
        assert float(batch.noise.std()) == pytest.approx(1, abs=0.01)
        assert batch.timesteps.min() >= 0
        assert batch.timesteps.max() < 1000
        tenths = torch.bincount(batch.timesteps // 100, minlength=10)
        assert tenths.min() > 70  # of 100 expected in each
        assert tenths.max() < 135

    def test_the_two_halves_have_unrelated_timesteps(self) -> None:
        instance, class_ = training_data().batch(range(200)).timesteps.chunk(2)
        assert (instance == class_).sum() < 5

    def test_the_posterior_is_sampled_anew_every_time(self) -> None:
        data = training_data(instance=1, std=2.0)
        drawn = data.batch(range(300)).latents[:300]  # the same image 300 times
        assert float(drawn.mean()) == pytest.approx(0, abs=0.03)
        assert float(drawn.std()) == pytest.approx(2, abs=0.03)
        assert not torch.equal(drawn[0], drawn[1])

    def test_the_posterior_sample_is_not_the_noise(self) -> None:
        batch = training_data(instance=1, class_=None, std=1.0).batch(range(1))
        assert not torch.equal(batch.latents, batch.noise)


class TestEpochs:
    def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own(self) -> None:
        data = training_data(instance=5, class_=7)
        orders = []
        for epoch in range(6):
            batch = data.batch(range(epoch * 35, (epoch + 1) * 35))
            instance, class_ = entries(batch)[:35], entries(batch)[35:]
            for start in range(0, 35, 5):
                orders.append(tuple(instance[start : start + 5]))
                assert sorted(orders[-1]) == [0, 1, 2, 3, 4]
            for start in range(0, 35, 7):
                assert sorted(class_[start : start + 7]) == list(range(1000, 1007))
        assert len(set(orders)) > 20  # of 42 orders out of 120 possible ones

    def test_another_seed_is_another_order(self) -> None:
        orders = {
            tuple(entries(training_data(instance=5, seed=seed, class_=None).batch(range(10)))) for seed in range(5)
        }
        assert len(orders) == 5

    def test_instance_and_class_half_are_ordered_apart(self) -> None:
        batch = training_data(instance=7, class_=7).batch(range(70))
        assert entries(batch)[:70] != [entry - 1000 for entry in entries(batch)[70:]]


class TestCropsAndText:
    def test_all_crops_of_an_image_come_up_with_the_images_own_text(self) -> None:
        batch = training_data(instance=2, crops=3).batch(range(120))
        pairs = {(entry, int(text)) for entry, text in zip(entries(batch)[:120], batch.text["ids"][:120], strict=True)}
        assert pairs == {(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 1)}

    def test_one_text_for_all(self) -> None:
        assert training_data(class_=7).batch(range(7)).text["ids"][7:].flatten().tolist() == [0] * 7

    def test_length_counts_images(self) -> None:
        assert len(image_set(4, crops=3)) == 4


class TestRepeats:
    def test_an_image_comes_up_as_often_as_it_repeats_in_every_epoch(self) -> None:
        data = training_data(instance=3, class_=None, repeats=(1, 3, 1))
        epochs = [entries(data.batch(range(start, start + 5))) for start in range(0, 50, 5)]
        assert all(sorted(epoch) == [0, 1, 1, 1, 2] for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 5

    def test_each_time_is_drawn_anew(self) -> None:
        batch = training_data(instance=1, class_=None, crops=4, repeats=(8,)).batch(range(8))
        assert len(set(entries(batch))) > 1
        assert len({float(noise[0, 0, 0]) for noise in batch.noise}) == 8

    def test_once_each_is_as_without(self) -> None:
        assert same(training_data(repeats=(1,) * 5).batch(range(40)), training_data().batch(range(40)))

    def test_the_class_half_stays_as_it_is(self) -> None:
        repeated, plain = (training_data(repeats=each).batch(range(40)) for each in ((1, 2, 3, 4, 5), ()))
        for one, other in zip(tensors(repeated), tensors(plain), strict=True):
            assert torch.equal(one[40:], other[40:])


class TestCaptionDropout:
    def dropped(self, batch: Batch) -> list[bool]:
        return [ids == [NO_TEXT] for ids in batch.text["ids"].tolist()]

    def test_it_takes_the_text_of_a_share_of_pairs_in_both_halves_and_nothing_else(self) -> None:
        plain, batch = (training_data(std=1.0, dropout=share).batch(range(2000)) for share in (0.0, 0.25))
        dropped = self.dropped(batch)
        assert dropped[:2000] == dropped[2000:]
        assert sum(dropped[:2000]) == pytest.approx(500, abs=60)  # three standard deviations
        for one, other in zip(tensors(batch)[:3], tensors(plain)[:3], strict=True):
            assert torch.equal(one, other)
        kept = [place for place, gone in enumerate(dropped) if not gone]
        assert torch.equal(batch.text["ids"][kept], plain.text["ids"][kept])

    def test_it_follows_from_the_pairs_number_and_the_seed(self) -> None:
        together = self.dropped(training_data(class_=None, dropout=0.5).batch(range(40)))
        data = training_data(class_=None, dropout=0.5)
        assert together == [self.dropped(data.batch(range(pair, pair + 1)))[0] for pair in range(40)]
        assert together != self.dropped(training_data(class_=None, dropout=0.5, seed=1).batch(range(40)))


class TestOffsetNoise:
    def test_it_shifts_whole_channels(self) -> None:
        plain, shifted = (training_data(offset=offset).batch(range(200)).noise for offset in (0.0, 0.5))
        shift = shifted - plain  # (400, 4, 8, 8)
        torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), rtol=0, atol=1e-6)
        assert float(shift[:, :, 0, 0].std()) == pytest.approx(0.5, abs=0.03)
        assert float(shift[:, :, 0, 0].mean()) == pytest.approx(0, abs=0.04)


class TestGenerator:
    def draw(self, *counters: int | str) -> Tensor:
        return torch.randn(8, generator=generator(*counters))

    def test_counting_is_all_there_is_to_it(self) -> None:
        assert torch.equal(self.draw(1, "pair", 0, 7), self.draw(1, "pair", 0, 7))

    @pytest.mark.parametrize("others", [(1, "pair", 7, 0), (1, "order", 0, 7), (1, "pair", "0", 7), (11, "pair", 0, 7)])
    def test_other_counters_are_another_stream(self, others: tuple[int | str, ...]) -> None:
        assert not torch.equal(self.draw(1, "pair", 0, 7), self.draw(*others))

    def test_the_global_generator_is_left_alone(self) -> None:
        before = torch.get_rng_state()
        training_data(std=1.0, offset=0.1).batch(range(4))
        assert torch.equal(torch.get_rng_state(), before)
