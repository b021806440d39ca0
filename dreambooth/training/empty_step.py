"""A training step on tensors without data, to trace its memory for a base model of any size."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dreambooth.models.base_settings import BaseSettings


class EmptyStep:
    """Denoiser and text encoders in training mode and a batch of `images` images of one size, as shapes alone.

    `text_encoders` are the folders of those that every step runs; the others give their states once. On the meta
    device, or on a real one under FakeTensorMode.
    """

    def __init__(
        self,
        directory: Path,
        *,
        size: tuple[int, int],
        images: int,
        text_encoders: Sequence[str],
        checkpointing: bool,
        device: str = "meta",
    ) -> None:
        settings = BaseSettings(directory)
        self._family = family = settings.family
        self.denoiser = family.empty(directory, family.denoiser.folder, device=device)
        present = [part.folder for part in family.text_encoders(directory)]
        encoders = {folder: family.empty(directory, folder, device=device) for folder in present}
        self.text_encoders = {folder: encoders[folder] for folder in present if folder in text_encoders}
        if checkpointing:
            self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
            for text_encoder in self.text_encoders.values():
                text_encoder.activation_checkpointing_enable()  # type: ignore[operator]
        for module in self.trained:
            module.train()
        shape = settings.x0_shape(*size)
        tokens = {
            name: one.expand(images, *one.shape[1:]).to(device) for name, one in family.blank_tokens(directory).items()
        }
        conditions = family.conditions([size], [(0, 0)], size)
        of_one = {name: one[0] for name, one in conditions.items()}
        process, rng = family.process(directory, shape), torch.Generator("cpu")
        moment, of_one = process.draw(rng), family.draw_conditions(process, torch.zeros(shape), of_one, rng)
        with torch.device(device):
            self._x0 = torch.empty(images, *shape)
            self._timesteps = torch.zeros(images, dtype=moment.dtype)
            self._conditions = {name: torch.zeros(images, *one.shape, dtype=one.dtype) for name, one in of_one.items()}
        self._text = {name: one for name, one in tokens.items() if name.partition(".")[0] in self.text_encoders}
        with torch.no_grad():
            for folder, module in encoders.items():
                if folder not in self.text_encoders:
                    self._text |= family.encode_with(folder, module.eval(), tokens)

    @property
    def trained(self) -> list[nn.Module]:
        """All modules of the step."""
        return [self.denoiser, *self.text_encoders.values()]

    def round_weights(self) -> None:
        """Have all weights of trained modules in bf16."""
        rounded: dict[nn.Parameter, nn.Parameter] = {}
        for module in (module for trained in self.trained for module in trained.modules()):
            for name, one in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if one not in rounded:  # T5's table has two names
                    rounded[one] = nn.Parameter(one.detach().bfloat16(), requires_grad=one.requires_grad)
                module.register_parameter(name, rounded[one])

    def round_inputs(self) -> None:
        """Have x0, text and conditions in bf16."""

        def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: one.bfloat16() if one.is_floating_point() else one for name, one in tensors.items()}

        self._x0, self._text, self._conditions = self._x0.bfloat16(), rounded(self._text), rounded(self._conditions)

    def model_pred(self) -> Tensor:
        """The forward pass: (images, C, H, W)."""
        text = self._family.encode_text(self.text_encoders, self._text)
        return self._family.denoise(self.denoiser, self._x0, self._timesteps, text, self._conditions)
