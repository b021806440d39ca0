"""The optimizer's groups and the learning-rate schedule."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreambooth.config.train import TrainConfig
from dreambooth.models.families.stable_diffusion import StableDiffusion
from dreambooth.models.process import Diffusion
from dreambooth.training.model import DreamBoothModel
from dreambooth.training.optimizer import build_lr_scheduler, build_optimizer, learning_rate_factor, moments
from dreambooth.training.optimizer_memory import moments_bytes


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


needs_torchao = pytest.mark.extras("torchao")
EIGHT_BIT = pytest.param("adamw8bit", marks=needs_torchao)
SHAPES = ((3, 5, 3, 3), (64, 64), (256, 48), (100, 41), (4096,), (5000,), (7,))


def optimizer_of(name: str, shapes: Sequence[Sequence[int]]) -> torch.optim.Optimizer:
    """After a step, of parameters of these shapes."""
    trained = model(with_text_encoder=False)
    trained.denoiser = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
    optimizer = build_optimizer(trained, TrainConfig.model_validate({"optimizer": name}))
    for parameter in trained.denoiser.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def plain_tensors(state: dict[str, Any]) -> list[Tensor]:
    """What is kept of a parameter, with the parts of a quantized tensor."""
    kept = [each for each in state.values() if isinstance(each, Tensor) and each.ndim]
    return [
        part
        for each in kept
        for part in ([getattr(each, one) for one in each.tensor_attrs] if hasattr(each, "tensor_attrs") else [each])
    ]


@pytest.mark.parametrize("name", ["adamw", EIGHT_BIT, "adafactor"])
class TestEveryOptimizer:
    def test_its_state_is_as_large_as_planned(self, name: str) -> None:
        for shape in SHAPES:
            [state] = optimizer_of(name, [shape]).state.values()
            assert moments_bytes(name, [shape]) == sum(each.nbytes for each in plain_tensors(state)), shape

    def test_its_moments_are_plain_and_all_that_could_overflow(self, name: str) -> None:
        optimizer = optimizer_of(name, SHAPES)
        assert {type(each) for each in moments(optimizer)} == {Tensor}
        assert len(list(moments(optimizer))) >= 2 * len(SHAPES)

    def test_its_settings(self, name: str) -> None:
        given = TrainConfig.model_validate({"optimizer": name, "learning_rate": 1e-3, "weight_decay": 0.3})
        for group in build_optimizer(model(), given).param_groups:
            assert float(group["lr"]) == pytest.approx(1e-3)
            assert group["weight_decay"] == 0.3

    def test_a_schedule_moves_its_rates(self, name: str) -> None:
        config = TrainConfig.model_validate({"optimizer": name, "max_train_steps": 4, "lr_scheduler": "linear"})
        optimizer = build_optimizer(model(), config)
        scheduler = build_lr_scheduler(optimizer, config)
        optimizer.step()
        scheduler.step()
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.75 * 5e-6] * 2)


@needs_torchao
def test_moments_in_eight_bits_are_near_those_in_32() -> None:
    torch.manual_seed(0)
    parameters = {}
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(0)
        trained = model(with_text_encoder=False)
        trained.denoiser = nn.Linear(64, 64, bias=False)
        before = trained.denoiser.weight.detach().clone()
        optimizer = build_optimizer(trained, TrainConfig.model_validate({"optimizer": name, "learning_rate": 1e-3}))
        for _ in range(10):
            trained.denoiser.weight.grad = torch.randn(64, 64)
            optimizer.step()
        parameters[name] = trained.denoiser.weight.detach() - before
    off = (parameters["adamw8bit"] - parameters["adamw"]).norm() / parameters["adamw"].norm()
    assert 0 < off < 0.05


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
