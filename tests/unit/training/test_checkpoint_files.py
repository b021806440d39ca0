"""A checkpoint's files: written as streams, they read as what was put in, tensor by tensor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dreambooth.training.checkpoint_files import CheckpointFile, save_files, write_pickle, write_safetensors


class Pieces:
    """A file that keeps only how large each piece was that it was given, and one piece's first byte."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def write(self, content: bytes | memoryview) -> int:
        self.sizes.append(memoryview(content).nbytes)
        return self.sizes[-1]

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_safetensors_reads_what_is_streamed(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = torch.arange(12).reshape(3, 4).remainder(2).to(dtype)
    tensors = {"rows": rows, "turned": rows.T, "one": rows[0, 1], "none": rows[:0]}
    with (tmp_path / "x.safetensors").open("wb") as file:
        write_safetensors(tensors, file, {"steps": "3"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"steps": "3"}


def test_files_are_written_below_a_folder_and_read_again(tmp_path: Path) -> None:
    state: dict[str, Any] = {"model": {"w": torch.rand(3, 5)}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    save_files([CheckpointFile(name="zero/states.pt", content=state)], tmp_path)
    again = torch.load(tmp_path / "zero" / "states.pt", weights_only=True)
    assert torch.equal(again["model"]["w"], state["model"]["w"])
    assert again["groups"] == state["groups"]


def test_no_writer_puts_tensors_together() -> None:
    tensors = {f"{index}": torch.zeros(1000 + index) for index in range(5)}
    for write in (write_pickle, write_safetensors):
        file = Pieces()
        write(tensors, file)
        assert max(file.sizes) <= 4 * 1004
        assert sum(file.sizes) >= 4 * 5010
