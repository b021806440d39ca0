"""Gradients, weight decay and learning rates of DeepFloyd IF."""

from pathlib import Path

import pytest
import torch
from deepfloyd_runs import SIDES, configured, prepared

from dreambooth.errors import InputError
from dreambooth.training.empty_step import EmptyStep
from dreambooth.training.engine import TorchEngine
from dreambooth.training.loop import fit
from dreambooth.training.model import load_model


class TestTraining:
    @pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
    def test_every_parameter_has_a_gradient_but_the_rows_of_the_variance(
        self, base: Path, photos: Path, checkpointing: bool
    ) -> None:
        config = configured(base, photos, text_encoders="all", gradient_checkpointing=checkpointing)
        model, data = load_model(base, config), prepared(base, config, photos)
        assert data.runs_text_encoders
        assert model.denoiser.is_gradient_checkpointing is checkpointing
        for step in range(3):
            model(*data.batch(range(2 * step, 2 * step + 2))).total.backward()
        without = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()]
        assert without == []
        for parameter in (model.denoiser.conv_out.weight, model.denoiser.conv_out.bias):  # type: ignore[union-attr]
            assert parameter.grad[:3].flatten(1 if parameter.ndim > 1 else 0).any()  # type: ignore[union-attr]
            assert not parameter.grad[3:].any()  # type: ignore[union-attr, index]

    def test_recomputed_activations_give_the_same_gradients(self, base: Path, photos: Path) -> None:
        gradients = []
        for checkpointing in (False, True):
            config = configured(base, photos, text_encoders="all", gradient_checkpointing=checkpointing)
            model, data = load_model(base, config), prepared(base, config, photos)
            model(*data.batch(range(2))).total.backward()
            gradients.append({name: one.grad for name, one in model.named_parameters()})
        torch.testing.assert_close(gradients[1], gradients[0])

    def test_weight_decay_leaves_the_rows_of_the_variance_alone(self, base: Path, photos: Path) -> None:
        config = configured(base, photos, weight_decay=1.0, learning_rate=0.01, ema_decay=0.9)
        model, data = load_model(base, config), prepared(base, config, photos)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        engine = TorchEngine(model, config.train)
        rates: list[float] = []
        fit(engine, data, config.train, on_step=lambda _, found: rates.append(found.text_encoder_learning_rate))  # type: ignore[union-attr]
        after = engine.state_dict()
        for name in ("denoiser.conv_out.weight", "denoiser.conv_out.bias"):
            assert torch.equal(after[name][3:], before[name][3:])
            assert not torch.equal(after[name][:3], before[name][:3])
        assert [name for name in before if torch.equal(after[name], before[name])] == []
        assert rates == [0.0, 0.0]

    def test_a_rate_for_a_text_encoder_that_is_not_trained_is_refused(self, base: Path, photos: Path) -> None:
        config = configured(base, photos, text_encoder_learning_rate=1e-6)
        with pytest.raises(InputError, match=r"text_encoder_learning_rate is 1e-06, but no text encoder"):
            load_model(base, config)

    def test_a_trained_t5_draws_nothing_at_random(self, base: Path, photos: Path) -> None:
        config = configured(base, photos, text_encoders="all")
        model, data = load_model(base, config), prepared(base, config, photos)
        assert model.training
        losses = [model(*data.batch(range(2))).total.item() for _ in range(2)]
        assert losses[0] == losses[1]

    def test_the_identifiers_embedding_in_t5_learns_at_its_own_rate(self, base: Path, photos: Path) -> None:
        config = configured(base, photos, text_encoders="all", identifier_learning_rate=0.1)
        model, data = load_model(base, config), prepared(base, config, photos)
        fit(TorchEngine(model, config.train), data, config.train)
        assert model.identifier_embeddings["text_encoder"].change.abs().max() > 0.05  # type: ignore[union-attr, operator]

    def test_a_step_can_be_counted_without_weights(self, base: Path, stage: str) -> None:
        step = EmptyStep(base, size=(SIDES[stage], SIDES[stage]), images=2, text_encoders=(), checkpointing=True)
        assert step.model_pred().shape == (2, 3, SIDES[stage], SIDES[stage])
