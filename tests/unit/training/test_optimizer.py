"""The optimizer's groups and the learning-rate schedule."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from dreambooth.config.train import TrainConfig
from dreambooth.models.families.stable_diffusion import StableDiffusion
from dreambooth.models.process import Diffusion
from dreambooth.training.model import DreamBoothModel
from dreambooth.training.optimizer import build_lr_scheduler, build_optimizer, learning_rate_factor


def model(*, with_text_encoder: bool = True) -> DreamBoothModel:
    return DreamBoothModel(
        family=StableDiffusion(),
        denoiser=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        text_encoders={"text_encoder": nn.Linear(3, 3)} if with_text_encoder else {},
        process=Diffusion(alphas_cumprod=torch.ones(1)),
        prior_loss_weight=1.0,
    )


def factors(**settings: Any) -> list[float]:
    config = TrainConfig(**settings)
    return [learning_rate_factor(step, config) for step in range(config.max_train_steps)]


class TestSchedule:
    def test_constant(self) -> None:
        assert factors(max_train_steps=3) == [1, 1, 1]

    def test_warm_up_is_linear_and_never_zero(self) -> None:
        assert factors(max_train_steps=6, lr_warmup_steps=3) == [0.25, 0.5, 0.75, 1, 1, 1]

    def test_linear_decay(self) -> None:
        assert factors(max_train_steps=4, lr_scheduler="linear") == [1, 0.75, 0.5, 0.25]

    def test_cosine_decay(self) -> None:
        expected = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
        assert factors(max_train_steps=4, lr_scheduler="cosine") == pytest.approx(expected)

    @pytest.mark.parametrize("decay", ["linear", "cosine"])
    def test_decay_starts_where_the_warm_up_ends(self, decay: str) -> None:
        rates = factors(max_train_steps=20, lr_warmup_steps=9, lr_scheduler=decay)
        assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
        assert all(before > after > 0 for before, after in itertools.pairwise(rates[9:]))
        assert learning_rate_factor(20, TrainConfig(max_train_steps=20, lr_warmup_steps=9, lr_scheduler=decay)) == 0

    def test_both_groups_follow_it_in_proportion(self) -> None:
        config = TrainConfig(
            max_train_steps=4, lr_scheduler="linear", learning_rate=4e-4, text_encoder_learning_rate=4e-6
        )
        optimizer = build_optimizer(model(), config)
        scheduler = build_lr_scheduler(optimizer, config)
        seen = []
        for _ in range(4):
            seen.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        assert seen == [pytest.approx([rate * 1e-4, rate * 1e-6]) for rate in (4, 3, 2, 1)]


class TestGroups:
    def test_every_parameter_is_in_its_components_group_once(self) -> None:
        trained = model()
        optimizer = build_optimizer(trained, TrainConfig(learning_rate=1e-3, text_encoder_learning_rate=1e-5))
        groups = [(group["lr"], {id(p) for p in group["params"]}) for group in optimizer.param_groups]
        assert groups == [
            (1e-3, {id(p) for p in trained.denoiser.parameters()}),
            (1e-5, {id(p) for p in trained.text_encoders["text_encoder"].parameters()}),
        ]

    def test_one_learning_rate_serves_both_unless_another_is_given(self) -> None:
        optimizer = build_optimizer(model(), TrainConfig(learning_rate=2e-4))
        assert [group["lr"] for group in optimizer.param_groups] == [2e-4, 2e-4]

    def test_a_frozen_text_encoder_has_none(self) -> None:
        config = TrainConfig(learning_rate=1e-3, text_encoder_learning_rate=1e-5)
        optimizer = build_optimizer(model(with_text_encoder=False), config)
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3]

    def test_it_is_adamw_with_the_settings_given(self) -> None:
        config = TrainConfig(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.3)
        optimizer = build_optimizer(model(), config)
        assert type(optimizer) is torch.optim.AdamW
        for group in optimizer.param_groups:
            assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.3)
