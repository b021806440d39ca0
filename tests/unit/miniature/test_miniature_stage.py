from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from dreambooth.miniature.pretraining.stage import Stage, fit

STAGE = Stage(name="line", steps=6, minutes=60, learning_rate=0.1, warmup=2, ema_decay=0.9)


def train(
    folder: Path, *, interrupt_at: int | None = None, stage: Stage = STAGE, two: bool = False
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)

    def loss_at(step: int, progress: float) -> Tensor:
        if step == interrupt_at:
            raise KeyboardInterrupt
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss: Tensor = ((module(inputs) - inputs.sum(1, keepdim=True)) ** 2).mean()
        return loss

    optimizers = (SGD([module.weight], lr=0.1, momentum=0.9), AdamW([module.bias], lr=0.2)) if two else ()
    return fit(stage, module, loss_at, folder, optimizers=optimizers, save_every_seconds=0).state_dict()


@pytest.mark.parametrize("two", [False, True], ids=["its optimizer", "two optimizers"])
def test_a_stopped_stage_goes_on_where_it_was(tmp_path: Path, two: bool) -> None:
    whole = train(tmp_path / "whole", two=two)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", interrupt_at=3, two=two)
    resumed = train(tmp_path / "stopped", two=two)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_stage_trains_no_further_and_gives_its_average_again(tmp_path: Path) -> None:
    first = train(tmp_path)
    assert all(torch.equal(first[name], value) for name, value in train(tmp_path, interrupt_at=0).items())
    state = torch.load(tmp_path / "line.pt", weights_only=True)
    assert not torch.equal(state["module"]["weight"], first["weight"])


def test_the_learning_rate_warms_up_and_comes_down_to_zero() -> None:
    assert STAGE.rate(0.0, 0) == 0.5
    assert STAGE.rate(0.0, 5) == 1.0
    assert STAGE.rate(1.0, 5) == 0.0


def test_a_stage_ends_with_its_minutes_too(tmp_path: Path) -> None:
    train(tmp_path, stage=Stage(name="line", steps=10**9, minutes=0.001, learning_rate=0.1))
    assert 0 < torch.load(tmp_path / "line.pt", weights_only=True)["step"] < 10**6
