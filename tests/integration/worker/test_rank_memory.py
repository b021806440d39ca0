"""Memory of a rank of ZeRO-3 while it loads a model that it shares with three others."""

import json
import os
import sys
from pathlib import Path

import torch
from full_size import write_configurations
from process_group import run_together

from dreambooth.miniature import PIPELINE_DIR
from dreambooth.models.families import family_of
from dreambooth.models.tensor_stream import Planned, header_of

SCRIPT = Path(__file__).with_name("rank_memory.py")
RANKS = 4
LARGEST_SHARE = 0.45
MOST_BUILT = 1.6
"""Of the engine: a fourth each of weights, masters, gradients and two moments are 1.25 of the whole."""


def write_zeros(base: Path) -> int:
    """Weights of a base's UNet and text encoder, all zero, as files that take no disk; returns their bytes in fp32."""
    family, size = family_of(base), 0
    for part in (family.denoiser, *family.text_encoders(base)):
        shapes = {name: tuple(one.shape) for name, one in family.empty(base, part.folder).named_parameters()}
        planned = [
            Planned(name=name, dtype=torch.float32, shape=shape, make=torch.Tensor) for name, shape in shapes.items()
        ]
        path = base / part.folder / f"{part.weights}.safetensors"
        path.write_bytes(header_of(planned, {"format": "pt"}))
        own = sum(tensor.size for tensor in planned)
        os.truncate(path, path.stat().st_size + own)
        size += own
    return size


def test_a_rank_holds_its_part_and_little_more(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    write_configurations(base, narrower=2)
    whole = write_zeros(base)
    assert whole > 10**9
    command = [sys.executable, str(SCRIPT), str(PIPELINE_DIR), str(base), str(tmp_path)]
    found = os.pathsep.join(path for path in sys.path if path)
    run_together([command] * RANKS, tmp_path, timeout=500, variables={"PYTHONPATH": found})
    for rank in range(RANKS):
        memory = json.loads((tmp_path / f"memory-{rank}.json").read_text())
        assert memory["held"] >= whole / RANKS
        assert memory["held"] <= memory["peak"] <= LARGEST_SHARE * whole, memory
        assert memory["built"] <= MOST_BUILT * whole, memory
