"""The optimizer and the learning-rate schedule, the same for every engine."""

import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dreambooth.config.train import TrainConfig
from dreambooth.errors import InputError
from dreambooth.quiet import quiet
from dreambooth.training.model import DreamBoothModel


def build_optimizer(model: DreamBoothModel, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of `config`, with parameter groups for denoiser, text encoders and the identifier's embeddings.

    Textual Inversion has the last alone. A further group, without weight decay, holds the denoiser's parameters some
    rows of which have no gradient, so that the optimizer leaves those rows as they are. Raises InputError where
    torchao is needed and missing.
    """
    groups = _groups(model, config)
    adam: dict[str, Any] = {
        "lr": config.learning_rates[0],
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw8bit":
        return _adamw8bit(groups, adam)
    if config.optimizer == "adafactor":
        return _adafactor(groups, config)
    # fused is one pass over each tensor: a fourth of the time of PyTorch's own choice on a CPU.
    return torch.optim.AdamW(groups, fused=True, **adam)


def _groups(model: DreamBoothModel, config: TrainConfig) -> list[dict[str, Any]]:
    denoiser_rate, text_encoder_rate = config.learning_rates
    groups: list[dict[str, Any]] = []
    undecayed: list[nn.Parameter] = []
    if config.method == "dreambooth":
        decayed, undecayed = _denoiser(model)
        groups.append({"params": decayed, "lr": denoiser_rate})
        if model.text_encoders:
            text_encoders = [p for text_encoder in model.text_encoders.values() for p in _trained(text_encoder)]
            groups.append({"params": text_encoders, "lr": text_encoder_rate})
    if len(model.identifier_embeddings):
        # Decay would pull the change to zero, which is where the base model passes over the identifier.
        rate = config.embedding_learning_rate
        groups.append({"params": _trained(model.identifier_embeddings), "lr": rate, "weight_decay": 0.0})
    if undecayed:
        groups.append({"params": undecayed, "lr": denoiser_rate, "weight_decay": 0.0})
    return groups


def check_optimizer_installed(name: str) -> None:
    """Raise InputError if the library of an optimizer is missing."""
    if name == "adamw8bit" and find_spec("torchao") is None:
        raise InputError(
            "train.optimizer adamw8bit needs torchao, which isn't installed here; pip install 'torchao>=0.18' on every "
            "machine, or take train.optimizer adafactor or adamw"
        )


def _adamw8bit(groups: list[dict[str, Any]], adam: dict[str, Any]) -> torch.optim.Optimizer:
    """torchao's AdamW: both moments in 8 bits by blocks of 256 values; those of small tensors stay fp32."""
    check_optimizer_installed("adamw8bit")
    quiet()  # about what torchao misses without a GPU
    from torchao.optim import AdamW8bit

    class Uncompiled(AdamW8bit):  # type: ignore[misc]
        """Steps without torch.compile, which takes a compiler and seconds for every shape of a parameter."""

        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    optimizer: torch.optim.Optimizer = Uncompiled(groups, **adam)
    return optimizer


def _adafactor(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """transformers' Adafactor without a first moment, by the learning rates and schedule that AdamW has."""
    from transformers.optimization import Adafactor

    optimizer: torch.optim.Optimizer = Adafactor(
        groups,
        lr=config.learning_rates[0],
        weight_decay=config.weight_decay,
        scale_parameter=False,
        relative_step=False,
    )
    return optimizer


def moments(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Plain tensors of an optimizer's state, finite if and only if the state is; quantized ones by their scales."""
    for of_one in optimizer.state.values():
        for moment in of_one.values():
            if isinstance(moment, Tensor):
                yield moment.scale if hasattr(moment, "scale") else moment


def _denoiser(model: DreamBoothModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trained parameters of the denoiser, with weight decay and without."""
    partly = set(model.family.partly_without_gradient(model.denoiser))
    trained = [(name, one) for name, one in model.denoiser.named_parameters() if one.requires_grad]
    return [one for name, one in trained if name not in partly], [one for name, one in trained if name in partly]


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Factor of the learning rates at an optimizer step: linear warm-up, then the chosen decay to 0."""
    if step < config.lr_warmup_steps:
        return (step + 1) / (config.lr_warmup_steps + 1)
    if config.lr_scheduler == "constant":
        return 1.0
    span = max(1, config.max_train_steps - config.lr_warmup_steps)
    progress = min(1.0, (step - config.lr_warmup_steps) / span)
    return 1.0 - progress if config.lr_scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def build_lr_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig) -> LambdaLR:
    """A scheduler to step once per optimizer step."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
