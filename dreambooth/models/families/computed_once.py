"""Faster sampling: compute results that a denoiser would compute repeatedly only once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class KeptText:
    """Keys and values of one text after the other, at the same addresses, for steps that a GPU replays.

    Those of a text that lies in one tensor, whose first step computes them and whose others read them.
    """

    def __init__(self) -> None:
        self._text: Tensor | None = None
        self._reading = False
        self._tensors: dict[str, Tensor] = {}

    @property
    def anything(self) -> bool:
        """Whether anything is kept."""
        return bool(self._tensors)

    def begin(self, text: Tensor | None, *, reading: bool) -> None:
        """Begin a step of the text in this tensor, a later one if `reading`."""
        self._text, self._reading = text, reading

    def keeping(self, name: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Keep the results of a layer with this name."""

        def kept(states: Tensor) -> Tensor:
            if states is not self._text:
                return forward(states)
            if self._reading:
                return self._tensors[name]
            result = forward(states)
            return self._tensors.setdefault(name, result).copy_(result)

        return kept


@contextmanager
def computed_once(unet: nn.Module, *, guided: bool, kept: KeptText | None = None) -> Iterator[None]:
    """Within this context `unet` (a UNet2DConditionModel) computes the same samples, up to rounding, with less work.

    - Every step projects the same text embeddings to keys and values of every cross-attention: now the first does.
    - Under classifier-free guidance (arXiv 2207.12598; `guided`) a batch is (2N, C, H, W), every latent twice, one for
      each text. The halves are equal until the first cross-attention: now one of them is computed up to there.

    With `kept` keys and values are read from there, and outlive the context. Don't enter it twice for the same `unet`,
    nor with gradients.
    """
    projections = dict(_text_projections(unet))
    hooks = []
    try:
        for name, projection in projections.items():
            plain = projection.forward
            projection.forward = _remembering(plain) if kept is None else kept.keeping(name, plain)
        for module in _before_text(unet) if guided else ():
            hooks += [module.register_forward_pre_hook(_first_half), module.register_forward_hook(_both_halves)]
        yield
    finally:
        for projection in projections.values():
            del projection.forward
        for hook in hooks:
            hook.remove()


def _text_projections(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            yield name, module


def _before_text(unet: Any) -> Iterator[nn.Module]:
    """Modules before the first cross-attention, in order."""
    yield unet.conv_in
    for block in unet.down_blocks:
        if hasattr(block, "attentions"):
            yield block.resnets[0]
            return
        yield from block.resnets
        yield from block.downsamplers or ()


def _remembering(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Cache the last result of `forward`, by the identity of its input tensor."""
    last: list[Tensor] = []

    def remembered(states: Tensor) -> Tensor:
        if not last or last[0] is not states:
            last[:] = states, forward(states)
        return last[1]

    return remembered


def _first_half(module: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.chunk(2)[0] for each in states)


def _both_halves(module: nn.Module, states: tuple[Tensor, ...], half: Tensor) -> Tensor:
    return torch.cat([half, half])
