"""Every optimizer by the reference engine: what moves and how far, resumes, and updates within the backward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from two_ranks import curve_of, training_data

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.errors import Diverged
from dreambooth.training.checkpoint_files import save_files
from dreambooth.training.engine import TorchEngine
from dreambooth.training.model import load_model

needs_torchao = pytest.mark.extras("torchao")
EIGHT_BIT = pytest.param("adamw8bit", marks=needs_torchao)
OPTIMIZERS = ("adamw", EIGHT_BIT, "adafactor")
STEPS, CHECKPOINT = 4, 2
RATES = {"denoiser": 1e-3, "text_encoder": 1e-4, "identifier_embeddings": 1e-2}
FUSED = ("train.max_grad_norm=null", "train.fused_backward=true")


def configuration(base: Path, *overrides: str) -> DreamBoothConfig:
    subject = {"name": "rex", "class_noun": "dog", "identifier": "tfz", "instance_images": "photos"}
    train = {
        "max_train_steps": STEPS,
        "learning_rate": RATES["denoiser"],
        "text_encoder_learning_rate": RATES["text_encoder"],
        "identifier_learning_rate": RATES["identifier_embeddings"],
    }
    return load_config({"base_model": str(base), "subject": subject, "train": train}, overrides)


class Run:
    """A training of a tiny base model: its engine, and its curve so far."""

    def __init__(self, base: Path, *overrides: str) -> None:
        self._config, self._data = configuration(base, *overrides), training_data(base)
        self.engine = TorchEngine(load_model(base, self._config), self._config.train)
        self.curve: list[dict[str, float]] = []

    def go(self, *, start: int = 0, checkpoint: Path | None = None) -> "Run":
        """Train from step `start`, and keep a checkpoint."""

        def after(step: int) -> None:
            if checkpoint is not None and step == CHECKPOINT:
                save_files(self.engine.snapshot().make(), checkpoint)

        self.curve = curve_of(self.engine, self._data, self._config, start=start, after=after)
        return self

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.model.state_dict().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def state_of(engine: TorchEngine) -> dict[str, Tensor]:
    """All that the optimizer keeps, as values."""
    states = engine.optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value.dequantize() if hasattr(value, "dequantize") else value)
        for number, state in states.items()
        for name, value in state.items()
    }


@pytest.mark.parametrize("fused", [(), FUSED], ids=["whole", "fused"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resume_is_bit_for_bit(tiny_pipeline: Path, tmp_path: Path, optimizer: str, fused: tuple[str, ...]) -> None:
    settings = (f"train.optimizer={optimizer}", "train.ema_decay=0.9", "train.lr_scheduler=cosine", *fused)
    whole = Run(tiny_pipeline, *settings).go(checkpoint=tmp_path)
    resumed = Run(tiny_pipeline, *settings)
    resumed.engine.load(tmp_path)
    resumed.go(start=CHECKPOINT)
    assert resumed.curve == whole.curve[CHECKPOINT:]
    assert differing(resumed.weights, whole.weights) == []
    assert differing(state_of(resumed.engine), state_of(whole.engine)) == []
    assert differing(resumed.engine.state_dict(), whole.engine.state_dict()) == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
class TestEvery:
    def test_each_group_moves_by_its_rate(self, tiny_pipeline: Path, optimizer: str) -> None:
        """A first step of all three is the rate's in size, where nothing decays."""
        settings = (f"train.optimizer={optimizer}", "train.max_train_steps=1", "train.weight_decay=0")
        run = Run(tiny_pipeline, *settings)
        before = run.weights
        after = run.go().weights
        for owner, rate in RATES.items():
            names = [name for name in before if name.startswith(f"{owner}.") and before[name].is_floating_point()]
            moved = torch.cat([(after[name] - before[name]).flatten() for name in names])
            typical = moved[moved != 0].square().mean().sqrt()
            assert 0.3 * rate < typical <= 1.05 * rate, owner

    def test_rows_without_a_gradient_stay(self, tiny_pipeline: Path, optimizer: str) -> None:
        """As those of all other words in a text encoder's table."""
        run = Run(tiny_pipeline, f"train.optimizer={optimizer}", "train.weight_decay=0")
        name = next(name for name in run.weights if name.endswith("token_embedding.weight"))
        before = run.weights[name]
        moved = (run.go().weights[name] != before).any(dim=1).sum()
        assert 0 < moved < 20

    def test_an_update_within_the_backward_pass_is_the_same(self, tiny_pipeline: Path, optimizer: str) -> None:
        settings = (f"train.optimizer={optimizer}", "train.max_grad_norm=null", "train.gradient_checkpointing=true")
        after, within = Run(tiny_pipeline, *settings).go(), Run(tiny_pipeline, *settings, "train.fused_backward=true")
        within.go()
        assert within.curve == after.curve
        assert differing(within.weights, after.weights) == []
        assert differing(state_of(within.engine), state_of(after.engine)) == []

    def test_moments_that_are_not_finite_are_not_kept(
        self, tiny_pipeline: Path, tmp_path: Path, optimizer: str
    ) -> None:
        run = Run(tiny_pipeline, f"train.optimizer={optimizer}", "train.max_train_steps=1").go()
        broken = torch.full_like(run.engine.parameters[0], float("inf"))
        for moment in run.engine.optimizer.state[run.engine.parameters[0]].values():
            if isinstance(moment, Tensor) and moment.ndim:
                moment.copy_(broken if moment.shape == broken.shape else torch.full_like(moment, float("inf")))
        for keep in (run.engine.state_dict, lambda: run.engine.save(tmp_path)):
            with pytest.raises(Diverged, match="weights or their moments are not finite after step 1"):
                keep()


def test_no_gradient_is_left_and_none_is_beside_another(tiny_pipeline: Path) -> None:
    run = Run(tiny_pipeline, *FUSED)
    most = 0

    def count(_: Any) -> None:
        nonlocal most
        most = max(most, sum(parameter.grad is not None for parameter in run.engine.parameters))

    for parameter in run.engine.parameters:
        parameter.register_post_accumulate_grad_hook(count)
    run.go()
    assert most == 0
    run.engine.close()
    run.engine.backward(run.engine(training_data(tiny_pipeline).batch(range(1))).total)
    assert all(parameter.grad is not None for parameter in run.engine.parameters)


def test_gradients_that_are_not_finite_are_told_within_the_pass_too(tiny_pipeline: Path) -> None:
    run = Run(tiny_pipeline, *FUSED)
    with torch.no_grad():
        run.engine.parameters[0].fill_(float("nan"))
    with pytest.raises(Diverged, match=r"set train.max_grad_norm \(there is none\)"):
        run.go()


def test_without_clipping_gradients_keep_their_size(tiny_pipeline: Path) -> None:
    norms = ("1e9", "null")
    free, none = (Run(tiny_pipeline, f"train.max_grad_norm={norm}").go() for norm in norms)
    assert none.curve == free.curve
    assert differing(none.weights, free.weights) == []
