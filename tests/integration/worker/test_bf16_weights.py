"""bf16 weights with fp32 masters, on two ranks: nothing that is kept is rounded, and nothing small gets lost.

On a tiny random base model, within one group of processes (bf16_ranks.py).
"""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import run_together
from torch import Tensor

from dreambooth.training.engine import TorchEngine
from dreambooth.training.model import load_model

sys.path.insert(0, str(Path(__file__).parent))
import bf16_ranks
import two_ranks

SCRIPT = Path(__file__).with_name("bf16_ranks.py")
STAGES = [case.name for case in bf16_ranks.LONG]
CASES = [*STAGES, *(case.name for case in bf16_ranks.SHORT)]
TIMEOUT_SECONDS = 900


@pytest.fixture(scope="module")
def base(tiny_pipeline: Path) -> dict[str, Tensor]:
    """The base's weights, by the names of an export."""
    config = two_ranks.configuration(tiny_pipeline, accumulation=1, accumulates=True)
    model = load_model(tiny_pipeline, config)
    return dict(model.exported({name: p.detach().clone() for name, p in model.named_parameters()}))


@pytest.fixture(scope="module")
def output(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have written, and one that went on."""
    folder = tmp_path_factory.mktemp("bf16")
    command = [sys.executable, str(SCRIPT), str(tiny_pipeline), str(folder)]
    run_together([command] * 2, folder, timeout=TIMEOUT_SECONDS)
    run_together([[*command, "more"]], folder, timeout=TIMEOUT_SECONDS)
    return folder


@pytest.fixture(scope="module")
def measured(output: Path) -> dict[str, Any]:
    result: dict[str, Any] = torch.load(output / "measured.pt", weights_only=True)
    return result


@pytest.fixture(scope="module")
def one_worker(tiny_pipeline: Path) -> Callable[[bool, bool], list[dict[str, float]]]:
    """The curve of a long run or of one with accumulation, with photographs of several sizes or not."""

    @cache
    def run(accumulates: bool, buckets: bool) -> list[dict[str, float]]:
        config = two_ranks.configuration(tiny_pipeline, accumulation=4 if accumulates else 2, accumulates=accumulates)
        steps = {"max_train_steps": bf16_ranks.FEW_STEPS if accumulates else bf16_ranks.STEPS}
        config = config.model_copy(update={"train": config.train.model_copy(update=steps)})
        engine = TorchEngine(load_model(tiny_pipeline, config, autocast=True), config.train)
        return two_ranks.curve_of(engine, two_ranks.training_data(tiny_pipeline, buckets=buckets), config)

    return run


def column(curve: list[dict[str, float]], name: str = "loss") -> list[float]:
    return [step[name] for step in curve]


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(sum((one[name] - other[name]).square().sum() for name in one) ** 0.5)


@pytest.mark.parametrize("case", CASES)
class TestEveryCase:
    def test_it_starts_from_the_base_bit_for_bit(
        self, measured: dict[str, Any], base: dict[str, Tensor], case: str
    ) -> None:
        start = measured["start"][case]
        assert start["state"].keys() == base.keys()
        assert [name for name in base if not torch.equal(start["state"][name], base[name])] == []
        assert start["dtypes"] == ["torch.bfloat16"]
        assert any(not torch.equal(value, value.bfloat16().float()) for value in base.values())

    @pytest.mark.parametrize(("name", "within"), [("loss", 0.02), ("grad_norm", 0.1)])
    def test_it_trains_as_one_worker_does(
        self,
        output: Path,
        one_worker: Callable[[bool, bool], list[dict[str, float]]],
        case: str,
        name: str,
        within: float,
    ) -> None:
        """Whose weights are fp32, and its products bf16."""
        curve = torch.load(output / f"{case}.pt", weights_only=True)["curve"]
        expected = one_worker("accumulation" in case, "buckets" in case)
        assert column(curve, name) == pytest.approx(column(expected, name), rel=within)


@pytest.mark.parametrize("case", [case.name for case in (*bf16_ranks.LONG, *bf16_ranks.SHORT) if case.resumes])
def test_a_resume_is_bit_for_bit(output: Path, case: str) -> None:
    result = torch.load(output / f"{case}.pt", weights_only=True)
    kept = bf16_ranks.FEW_CHECKPOINT if "accumulation" in case else bf16_ranks.CHECKPOINT
    assert len(result["resumed_curve"]) == len(result["curve"]) - kept > 0
    assert result["resumed_curve"] == result["curve"][kept:]
    state, resumed = result["state"], result["resumed_state"]
    assert state.keys() == resumed.keys()
    assert [name for name in state if not torch.equal(state[name], resumed[name])] == []


@pytest.mark.parametrize("case", STAGES)
class TestEveryStage:
    def test_one_rank_goes_on_from_two(self, output: Path, case: str) -> None:
        """And has the losses of two, but for the order of sums."""
        parts = [
            torch.load(output / f"{case}-to-{end}.pt", weights_only=True) for end in (bf16_ranks.PART, bf16_ranks.END)
        ]
        whole = torch.load(output / f"{case}.pt", weights_only=True)["curve"]
        assert column([step for part in parts for step in part["curve"]]) == pytest.approx(column(whole), rel=1e-3)

    def test_small_updates_are_those_of_fp32_weights(
        self, measured: dict[str, Any], base: dict[str, Tensor], case: str
    ) -> None:
        """At the paper's rate, which bf16 weights alone would round away."""
        plain, small = (measured["small"][name] for name in (bf16_ranks.TORCH.name, case))
        moved = distance(plain["state"], base)
        assert distance(small["state"], plain["state"]) < 0.1 * moved
        assert distance({name: value.bfloat16().float() for name, value in base.items()}, base) > moved
        assert column(small["curve"]) == pytest.approx(column(plain["curve"]), rel=5e-3)

    def test_half_the_bytes_are_sent(self, measured: dict[str, Any], case: str) -> None:
        stage = STAGES.index(case) + 1
        sent = (measured["sent"][stage, dtype] for dtype in (0, 1))
        # ZeRO-3 also broadcasts the order in which it gathers.
        fp32, bf16 = (sum(count for name, count in each.items() if name != "broadcast_") for each in sent)
        assert bf16 == pytest.approx(fp32 / 2, rel=1e-3)

    def test_numbers_that_are_not_finite(self, measured: dict[str, Any], case: str) -> None:
        for rank in measured["diverging"][case]:
            assert rank["steps"] == list(range(2, two_ranks.POISONED))
            assert f"at step {two_ranks.POISONED}; lower train.learning_rate (it is 0.001)" in rank["fit"]
            assert ["moments are not finite after step 1" in said for said in rank["moment"]] == [True, True]
            assert rank["healthy"] == "nothing"
