"""Blocks that ZeRO-3 gathers as wholes; that it trains as one worker does, test_engines.py shows."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from replicas import built
from torch import Tensor, nn

from dreambooth.models.families import family_of
from pipelines.worker.zero3 import repeated_blocks, take_inputs_by_place


class Block(nn.Module):
    """Called as diffusers calls those of FLUX."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, states: Tensor, scale: Tensor | None = None, *, twice: bool = False) -> tuple[Tensor, Tensor]:
        out = self.inner(states) * (1.0 if scale is None else scale)
        return states, out * 2 if twice else out


@pytest.mark.parametrize(
    ("name", "folder", "kinds"),
    [
        ("stable-diffusion-1.5", "unet", {"BasicTransformerBlock"}),
        ("stable-diffusion-3.5", "transformer", {"JointTransformerBlock"}),
        ("flux-dev", "transformer", {"FluxTransformerBlock", "FluxSingleTransformerBlock"}),
        ("pixart-sigma", "transformer", {"BasicTransformerBlock"}),
    ],
)
def test_the_blocks_of_every_family(name: str, folder: str, kinds: set[str], tmp_path: Path) -> None:
    base = built(name, tmp_path / "base")
    assert {kind.__name__ for kind in repeated_blocks(family_of(base).empty(base, folder))} == kinds


@pytest.mark.parametrize("by_place", [True, False])
def test_gradients_are_there_when_a_block_s_backward_pass_is_over(by_place: bool) -> None:
    """As DeepSpeed needs it, which would reduce zeros in their stead; without inputs by place they aren't."""
    block, seen = Block(), []
    if by_place:
        take_inputs_by_place(block)
    block.register_full_backward_hook(lambda *_: seen.append(block.inner.weight.grad is not None))
    states, scale = torch.ones(1, 2, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    before, out = block(states=states * 1, scale=scale * 1, twice=True)
    with nullcontext() if by_place else pytest.warns(UserWarning, match="no inputs require gradients"):
        (before + out).sum().backward()
    assert seen == [by_place]


def test_the_values_stay_the_same() -> None:
    block, states = Block(), torch.ones(1, 2)
    expected = block(states, twice=True)[1]
    take_inputs_by_place(block)
    assert torch.equal(block(states=states, twice=True)[1], expected)
    assert torch.equal(block(states)[1] * 2, expected)
