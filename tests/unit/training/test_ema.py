"""The moving average: its formula, and that looking at it changes nothing."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dreambooth.training.checkpoint_files import save_files
from dreambooth.training.ema import Ema


def masters() -> list[Tensor]:
    return [torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.tensor([[4.0]])]


def add(tensors: list[Tensor], value: float) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(value)


def averages(ema: Ema) -> list[list[float]]:
    return [average.flatten().tolist() for average in ema.averages]


def test_the_formula() -> None:
    tensors = masters()
    ema = Ema(tensors, decay=0.25)
    expected = 1.0
    for step in range(1, 8):
        add(tensors, 1.0)
        ema.update()
        decay = min(0.25, (1 + step) / (10 + step))  # 2/11, 3/12, then 0.25
        expected = decay * expected + (1 - decay) * (1.0 + step)
        assert averages(ema)[0][0] == pytest.approx(expected, rel=1e-6)
        assert averages(ema) == [pytest.approx([expected, expected + 1]), pytest.approx([expected + 3])]
    assert ema.steps == 7


def test_short_runs_are_not_held_back_by_where_they_started() -> None:
    tensors = [torch.tensor([0.0])]
    ema = Ema(tensors, decay=0.9999)
    add(tensors, 1.0)
    for _ in range(20):
        ema.update()
    assert averages(ema)[0][0] > 0.99


def test_it_starts_as_a_copy() -> None:
    tensors = masters()
    ema = Ema(tensors, decay=0.5)
    add(tensors, 5.0)
    assert averages(ema) == [[1.0, 2.0], [4.0]]


def test_applied_swaps_in_place_and_back() -> None:
    tensors = masters()
    ema = Ema(tensors, decay=0.5)
    add(tensors, 5.0)
    pointers = [tensor.data_ptr() for tensor in tensors]
    with ema.applied():
        assert [tensor.flatten().tolist() for tensor in tensors] == [[1.0, 2.0], [4.0]]
        assert [tensor.data_ptr() for tensor in tensors] == pointers
    assert [tensor.flatten().tolist() for tensor in tensors] == [[6.0, 7.0], [9.0]]
    assert averages(ema) == [[1.0, 2.0], [4.0]]


def test_applied_swaps_back_after_a_failure() -> None:
    tensors = masters()
    ema = Ema(tensors, decay=0.5)
    add(tensors, 5.0)
    with pytest.raises(RuntimeError, match="full disk"), ema.applied():
        raise RuntimeError("full disk")
    assert [tensor.flatten().tolist() for tensor in tensors] == [[6.0, 7.0], [9.0]]


def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    one, other = masters(), masters()
    kept, restored = Ema(one, decay=0.9), Ema(other, decay=0.9)
    for _ in range(3):
        add(one, 0.3)
        kept.update()
    save_files([kept.file("ema.safetensors")], tmp_path)
    add(other, 0.3)
    add(other, 0.3)
    add(other, 0.3)
    restored.load(tmp_path / "ema.safetensors", steps=3)
    assert averages(restored) == averages(kept)
    for ema in (kept, restored):
        add(ema.masters, 0.3)
        ema.update()
    assert averages(restored) == averages(kept)
    assert restored.steps == kept.steps == 4
