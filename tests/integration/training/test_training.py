"""The loop with the reference engine, on a tiny base model: what comes out, and that nothing on the way changes it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.batches import TrainingData
from dreambooth.data.images import find_instance_images
from dreambooth.data.latents import LatentCache
from dreambooth.data.prepare import prepare_data
from dreambooth.errors import Diverged
from dreambooth.miniature import PIPELINE_DIR
from dreambooth.training.engine import TorchEngine
from dreambooth.training.loop import StepMetrics, fit
from dreambooth.training.model import load_model


class Training:
    """One run of `fit`: its settings, its engine, and the metrics and steps that it told."""

    def __init__(self, base: Path, images: Path, *overrides: str, autocast: bool = False) -> None:
        subject = {"name": "rex", "class_noun": "dog", "identifier": "tfz", "instance_images": str(images)}
        plain: dict[str, Any] = {
            "base_model": str(base),
            "subject": subject,
            "images": {"resolution": 64},
            "train": {"max_train_steps": 4, "learning_rate": 1e-3},
        }
        self.config: DreamBoothConfig = load_config(plain, overrides)
        class_images = [Image.new("RGB", (64, 64), (index * 60, 90, 0)) for index in range(3)]
        self.data: TrainingData = prepare_data(
            base,
            self.config,
            find_instance_images([str(images)]),
            class_images if self.config.prior.enabled else [],
        )
        self.engine = TorchEngine(load_model(base, self.config, autocast=autocast), self.config.train)
        self.metrics: list[StepMetrics] = []
        self.steps: list[int] = []

    def run(self, *, start: int = 0, after: Callable[[int], None] = lambda step: None) -> "Training":
        def on_step(step: int, metrics: StepMetrics | None) -> None:
            self.steps.append(step)
            if metrics is not None:
                self.metrics.append(metrics)
            after(step)

        fit(self.engine, self.data, self.config.train, start=start, on_step=on_step)
        return self

    @property
    def curve(self) -> list[tuple[float, ...]]:
        """What is no matter of speed."""
        return [
            tuple(value for name, value in m.as_dict().items() if name != "images_per_second") for m in self.metrics
        ]

    @property
    def losses(self) -> list[float]:
        return [metrics.loss for metrics in self.metrics]


@pytest.fixture
def training(tiny_pipeline: Path, instance_folder: Path) -> Callable[..., Training]:
    return lambda *overrides, **settings: Training(tiny_pipeline, instance_folder, *overrides, **settings)


@pytest.fixture(scope="module")
def plain(tiny_pipeline: Path, instance_folder: Path) -> Training:
    """A finished run of the settings above, to compare with."""
    return Training(tiny_pipeline, instance_folder).run()


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class TestResume:
    settings = (
        "train.max_train_steps=4",
        "train.lr_scheduler=cosine",
        "train.lr_warmup_steps=2",
        "train.ema_decay=0.9",
        "train.gradient_accumulation_steps=2",
        "train.min_snr_gamma=5",
        "train.noise_offset=0.1",
        "train.caption_dropout=0.3",
        "images.repeats={00.png: 2}",
    )

    def test_bit_for_bit(self, training: Callable[..., Training], tmp_path: Path) -> None:
        whole = training(*self.settings)
        whole.run(after=lambda step: whole.engine.save(tmp_path) if step == 2 else None)
        resumed = training(*self.settings)
        resumed.engine.load(tmp_path)
        resumed.run(start=2)
        assert resumed.steps == [3, 4]
        assert resumed.curve == whole.curve[2:]
        assert_same(resumed.engine.state_dict(), whole.engine.state_dict())
        assert_same(dict(resumed.engine.model.state_dict()), dict(whole.engine.model.state_dict()))

    def test_photographs_of_several_sizes(self, tmp_path: Path) -> None:
        """On the miniature, in batches of one size each."""
        folder = tmp_path / "red-dog"
        folder.mkdir()
        for index, (width, height) in enumerate([(96, 64), (70, 70), (64, 100), (100, 70), (72, 80)]):
            Image.effect_noise((width, height), 60).convert("RGB").save(folder / f"{index:02d}.png")
        settings = (
            "images.aspect_buckets=true",
            "train.micro_batch_size=2",
            "train.max_train_steps=6",
            self.settings[-1],
        )
        whole = Training(PIPELINE_DIR, folder, *settings)
        assert len(whole.data.buckets) == 4
        whole.run(after=lambda step: whole.engine.save(tmp_path) if step == 2 else None)
        resumed = Training(PIPELINE_DIR, folder, *settings)
        resumed.engine.load(tmp_path)
        resumed.run(start=2)
        assert resumed.curve == whole.curve[2:]
        assert_same(resumed.engine.state_dict(), whole.engine.state_dict())

    def test_without_the_checkpoint_it_would_show(self, training: Callable[..., Training]) -> None:
        whole, forgetful = training("train.max_train_steps=2").run(), training("train.max_train_steps=2").run(start=1)
        assert forgetful.curve != whole.curve[1:]

    def test_the_same_run_twice_is_the_same(self, training: Callable[..., Training], plain: Training) -> None:
        again = training().run()
        assert again.curve == plain.curve
        assert_same(again.engine.state_dict(), plain.engine.state_dict())
        assert training("train.seed=1", "train.max_train_steps=1").run().curve[0] != plain.curve[0]


class TestAccumulation:
    def test_two_micro_steps_are_a_batch_of_two(self, training: Callable[..., Training]) -> None:
        accumulated = training("train.gradient_accumulation_steps=2", "train.max_grad_norm=0.5").run()
        batched = training("train.micro_batch_size=2", "train.max_grad_norm=0.5").run()
        for one, other in zip(accumulated.curve, batched.curve, strict=True):
            assert one == pytest.approx(other, rel=1e-4)
        state, expected = accumulated.engine.state_dict(), batched.engine.state_dict()
        for name, tensor in state.items():
            # Adam makes a full step of a gradient that is nothing but rounding, so a few values may differ by as much.
            assert (tensor - expected[name]).abs().quantile(0.9) < 1e-5, name

    def test_the_engine_acts_at_the_boundary_alone(self, training: Callable[..., Training]) -> None:
        run = training("train.gradient_accumulation_steps=3")
        before = run.engine.state_dict()
        for micro_step in range(3):
            assert_same(run.engine.state_dict(), before)
            run.engine.backward(run.engine(run.data.batch(range(micro_step, micro_step + 1))).total)
            run.engine.step()
        after = run.engine.state_dict()
        assert any(not torch.equal(after[name], before[name]) for name in before)
        assert all(parameter.grad is None for parameter in run.engine.parameters)


class TestMetrics:
    def test_every_nth_step_and_the_last(self, training: Callable[..., Training], plain: Training) -> None:
        run = training("train.log_every=3").run()
        assert run.curve == plain.curve[2:]
        assert run.steps == [1, 2, 3, 4]
        assert [metrics.step for metrics in run.metrics] == [3, 4]

    def test_the_total_is_made_of_the_halves(self, training: Callable[..., Training]) -> None:
        for metrics in training("prior.prior_loss_weight=0.3").run().metrics:
            assert metrics.loss == pytest.approx(metrics.instance_loss + 0.3 * metrics.prior_loss, rel=1e-6)
            assert metrics.prior_loss > 0

    def test_without_prior_preservation(self, training: Callable[..., Training], plain: Training) -> None:
        run = training("prior.prior_loss_weight=0").run()
        assert run.data.class_ is None
        assert run.metrics[0].instance_loss == pytest.approx(plain.metrics[0].instance_loss, rel=1e-4)
        assert all(metrics.loss == metrics.instance_loss for metrics in run.metrics)
        assert all(metrics.prior_loss == 0 for metrics in run.metrics)

    def test_learning_rates_are_those_that_the_step_was_made_with(self, training: Callable[..., Training]) -> None:
        run = training("train.lr_warmup_steps=3", "train.text_encoder_learning_rate=1e-5").run()
        rates = [(metrics.learning_rate, metrics.text_encoder_learning_rate) for metrics in run.metrics]
        assert rates == [pytest.approx((part * 1e-3, part * 1e-5)) for part in (0.25, 0.5, 0.75, 1)]

    def test_the_gradient_norm_is_that_before_clipping(self, training: Callable[..., Training]) -> None:
        clipped, free = (training(f"train.max_grad_norm={norm}", "train.max_train_steps=1") for norm in (1e-3, 1e3))
        assert clipped.run().metrics[0].grad_norm == pytest.approx(free.run().metrics[0].grad_norm)
        assert clipped.metrics[0].grad_norm > 0.01

    def test_training_lowers_the_loss(self, training: Callable[..., Training]) -> None:
        run = training("train.max_train_steps=30", "train.learning_rate=1e-2").run()
        assert sum(run.losses[-10:]) < 0.8 * sum(run.losses[:10])


class TestDiverged:
    def test_it_says_where_and_what_to_lower(self, training: Callable[..., Training]) -> None:
        run = training()
        latents = run.data.instance.latents
        poisoned = LatentCache(mean=latents.mean * float("nan"), std=latents.std)
        run.data = replace(run.data, instance=replace(run.data.instance, latents=poisoned))
        with pytest.raises(Diverged) as caught:
            run.run()
        assert str(caught.value) == (
            "the loss is nan and its gradient's norm nan at step 1; "
            "lower train.learning_rate (it is 0.001) or train.max_grad_norm (it is 1.0)"
        )
        assert run.steps == []  # nothing is logged or kept of such a step

    @pytest.mark.parametrize(("device", "told"), [("cpu", "norm nan at step 2"), ("cuda", "not finite at step 2")])
    def test_between_metrics_too(self, training: Callable[..., Training], device: str, told: str) -> None:
        """At that step, or, where a device would have to be waited for, with the next metrics."""
        run = training("train.log_every=3")

        def poison(step: int) -> None:
            with torch.no_grad():
                next(run.engine.model.parameters()).fill_(float("nan"))

        plain = run.engine.diverged_at
        run.engine.diverged_at = lambda *, wait=True: plain() if wait or device == "cpu" else None  # type: ignore[method-assign]
        with pytest.raises(Diverged, match=f"{told}; lower train.learning_rate"):
            run.run(after=poison)
        assert run.metrics == []

    @pytest.mark.parametrize("kind", ["weight", "moment"])
    def test_after_the_last_step(self, training: Callable[..., Training], tmp_path: Path, kind: str) -> None:
        """No loss shows it any more."""
        run = training().run()
        parameter = run.engine.parameters[3]
        broken = parameter.data if kind == "weight" else run.engine.optimizer.state[parameter]["exp_avg_sq"]
        broken.view(-1)[-1] = float("inf")
        for keep in (run.engine.state_dict, lambda: run.engine.save(tmp_path)):
            with pytest.raises(Diverged, match="weights or their moments are not finite after step 4"):
                keep()
        assert list(tmp_path.glob("engine*")) == []


class TestWhatIsTrained:
    def test_every_parameter_of_denoiser_and_text_encoder(self, training: Callable[..., Training]) -> None:
        run = training("train.weight_decay=0")  # which would move those that have no gradient, too
        before = run.engine.state_dict()
        after = run.run().engine.state_dict()
        assert {name.partition(".")[0] for name in before} == {"denoiser", "text_encoder"}
        assert len(before) == len(list(run.engine.model.parameters()))
        assert [name for name in before if torch.equal(before[name], after[name])] == []

    def test_the_identifiers_own_embedding_moves_and_those_of_other_words_stay(
        self, training: Callable[..., Training]
    ) -> None:
        run = training("train.weight_decay=0")
        name = next(name for name in run.engine.state_dict() if name.endswith("token_embedding.weight"))
        before = run.engine.state_dict()[name]
        moved = (run.run().engine.state_dict()[name] != before).any(dim=1).nonzero().flatten().tolist()
        used = {*run.data.instance.text["text_encoder.input_ids"].flatten().tolist()}
        assert run.data.class_ is not None
        assert moved == sorted(used | {*run.data.class_.text["text_encoder.input_ids"].flatten().tolist()})

    def test_a_frozen_text_encoder_stays_and_gives_the_same_first_loss(
        self, training: Callable[..., Training], plain: Training
    ) -> None:
        frozen = training("train.train_text_encoder=false").run()
        assert frozen.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)
        assert frozen.losses[1] != plain.losses[1]
        assert {name.partition(".")[0] for name in frozen.engine.state_dict()} == {"denoiser"}
        assert frozen.metrics[0].text_encoder_learning_rate == 0

    def test_gradient_checkpointing_changes_nothing(self, training: Callable[..., Training], plain: Training) -> None:
        checkpointed = training("train.gradient_checkpointing=true").run()
        denoiser = checkpointed.engine.model.denoiser
        assert denoiser.is_gradient_checkpointing
        assert checkpointed.engine.model.text_encoders["text_encoder"].is_activation_checkpointing
        assert checkpointed.losses == pytest.approx(plain.losses, rel=1e-5)

    def test_small_updates_are_not_rounded_away_under_bf16(self, training: Callable[..., Training]) -> None:
        run = training("train.learning_rate=5e-6", "train.weight_decay=0", autocast=True)
        exact = training("train.learning_rate=5e-6", "train.weight_decay=0").run()
        before = run.engine.state_dict()
        after = run.run().engine.state_dict()
        assert all(parameter.dtype is torch.float32 for parameter in run.engine.parameters)
        moved = torch.cat([(after[name] - before[name]).flatten() for name in before if "token_emb" not in name])
        assert (moved != 0).float().mean() > 0.95
        assert moved.abs().max() < 5 * 5e-6
        assert run.losses == pytest.approx(exact.losses, rel=0.02)
        assert run.losses != exact.losses  # it did run in bf16


class TestMovingAverage:
    def test_it_is_what_is_exported_while_the_training_goes_on_from_the_parameters(
        self, training: Callable[..., Training], plain: Training
    ) -> None:
        averaged = training("train.ema_decay=0.5").run()
        assert averaged.curve == plain.curve
        assert_same(dict(averaged.engine.model.state_dict()), dict(plain.engine.model.state_dict()))
        exported, last = averaged.engine.state_dict(), plain.engine.state_dict()
        assert [name for name in exported if torch.equal(exported[name], last[name])] == []
        assert_same(averaged.engine.state_dict(averaged=False), last)

    def test_an_export_does_not_disturb_it(self, training: Callable[..., Training]) -> None:
        settings = ("train.ema_decay=0.5", "train.max_train_steps=2")
        looked_at, left_alone = training(*settings), training(*settings).run()
        looked_at.run(after=lambda step: looked_at.engine.state_dict() and None)
        assert looked_at.curve == left_alone.curve
        assert_same(looked_at.engine.state_dict(), left_alone.engine.state_dict())

    def test_what_is_exported_is_a_copy(self, training: Callable[..., Training]) -> None:
        run = training()
        before = run.engine.state_dict()
        kept = {name: tensor.clone() for name, tensor in before.items()}
        run.run()
        assert_same(before, kept)
