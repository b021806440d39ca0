"""Every family with every engine on two ranks: the losses of one worker, and all weights."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from family_ranks import BF16, configuration, training_data
from PIL import Image
from process_group import run_together
from replicas import REPLICAS, deepfloyd
from two_ranks import STAGES, Case, curve_of

from dreambooth.training.engine import TorchEngine
from dreambooth.training.model import load_model

SCRIPT = Path(__file__).with_name("family_ranks.py")
BUILDS = {**REPLICAS, "deepfloyd-if-super-resolution": deepfloyd.build_super_resolution}
ENGINES = [Case(stage=stage).name for stage in STAGES]
TIMEOUT_SECONDS = 500


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    (folder / "photographs").mkdir()
    for place in range(3):
        noise = Image.effect_noise((96 + 16 * place, 80), 80).convert("RGB")
        noise.save(folder / "photographs" / f"{place}.png")
    for name, build in BUILDS.items():
        (folder / name).mkdir()
        torch.manual_seed(0)
        build(folder / name)
    return {name: folder / name for name in BUILDS}


@pytest.fixture(scope="module")
def results(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Curves and exported weights by base and engine, of two ranks."""
    output = tmp_path_factory.mktemp("engines")
    command = [sys.executable, str(SCRIPT), str(output), *map(str, bases.values())]
    found = os.pathsep.join(path for path in sys.path if path)
    run_together([command] * 2, output, timeout=TIMEOUT_SECONDS, variables={"PYTHONPATH": found})
    return {name: torch.load(output / f"{base.name}.pt", weights_only=True) for name, base in bases.items()}


@pytest.mark.parametrize("name", BUILDS)
def test_all_engines_have_the_losses_of_one_worker(name: str, bases: dict[str, Path], results: dict[str, Any]) -> None:
    base, found = bases[name], results[name]
    config = configuration(base, accumulation=2)
    engine = TorchEngine(load_model(base, config), config.train)
    expected = curve_of(engine, training_data(base, config), config)
    names = sorted(engine.state_dict())
    assert list(found) == [*ENGINES, BF16.name]
    assert len({step["loss"] for step in expected}) == len(expected)
    for engine_name in ENGINES:
        assert sorted(found[engine_name]["state"]) == names
        for step, other in zip(found[engine_name]["curve"], expected, strict=True):
            assert step == pytest.approx(other, rel=2e-4), engine_name
    assert sorted(found[BF16.name]["state"]) == names
    for step, other in zip(found[BF16.name]["curve"], expected, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-2)


@pytest.mark.parametrize("name", ["deepfloyd-if", "deepfloyd-if-super-resolution"])
@pytest.mark.parametrize("engine", [*ENGINES, BF16.name])
def test_weight_decay_leaves_rows_without_gradient_alone(
    name: str, engine: str, bases: dict[str, Path], results: dict[str, Any]
) -> None:
    before = load_model(bases[name], configuration(bases[name], accumulation=1)).denoiser.conv_out
    after = results[name][engine]["state"]
    for part in ("weight", "bias"):
        mine, old = after[f"denoiser.conv_out.{part}"], before.get_parameter(part)  # type: ignore[operator]
        assert torch.equal(mine[3:], old[3:])
        assert not torch.equal(mine[:3], old[:3])
