"""Every engine on two ranks, without Ray: the same losses as one worker, the same weights, and exact resumes.

All cases run within one pair of processes (two_ranks.py), since starting those takes longer than a case.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from process_group import run_together
from torch import Tensor

from dreambooth.training.engine import TorchEngine
from dreambooth.training.model import load_model

SCRIPT = Path(__file__).with_name("two_ranks.py")
ENGINES = ("torch", "zero0", "zero1", "zero2", "zero3")
RESIZED = ((2, 8), (1, 16), (2, 24))
"""How many ranks go on to which step."""
TIMEOUT_SECONDS = 550


def _two_ranks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("two_ranks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["two_ranks"] = module
    spec.loader.exec_module(module)
    return module


two_ranks = _two_ranks()


@pytest.fixture(scope="module")
def results(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 of two has to say of every case."""
    output = tmp_path_factory.mktemp("engines")
    run_ranks(2, tiny_pipeline, output)
    names = [*(case.name for case in two_ranks.CASES), "diverging"]
    return {name: torch.load(output / f"{name}.pt", weights_only=True) for name in names}


def run_ranks(count: int, base: Path, output: Path, *part: int | str) -> None:
    """Start two_ranks.py `count` times as one process group."""
    command = [sys.executable, str(SCRIPT), str(base), str(output), *map(str, part)]
    run_together([command] * count, output, timeout=TIMEOUT_SECONDS)


@pytest.fixture(scope="module")
def resized(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The start of every long run in three parts, each going on from the one before: on two ranks, one, two."""
    output = tmp_path_factory.mktemp("resized")
    start = 0
    for count, end in RESIZED:
        run_ranks(count, tiny_pipeline, output, start, end)
        start = end
    result = {}
    for engine in ENGINES:
        parts = [torch.load(output / f"{engine}-to-{end}.pt", weights_only=True) for _, end in RESIZED]
        result[engine] = {"curve": [step for part in parts for step in part["curve"]], "state": parts[-1]["state"]}
    return result


@pytest.fixture(scope="module")
def one_worker(tiny_pipeline: Path) -> Callable[..., dict[str, Any]]:
    """The same training by one process, which accumulates what the other ranks would have done."""

    def run(*, accumulates: bool, buckets: bool = False, optimizer: str = "adamw") -> dict[str, Any]:
        return trained(accumulates, buckets, optimizer)

    @cache
    def trained(accumulates: bool, buckets: bool, optimizer: str) -> dict[str, Any]:
        config = two_ranks.configuration(
            tiny_pipeline, accumulation=4 if accumulates else 2, accumulates=accumulates, optimizer=optimizer
        )
        engine = TorchEngine(load_model(tiny_pipeline, config), config.train)
        weights = {0: exported(engine)}

        def keep(step: int) -> None:
            if step in (RESIZED[-1][1], config.train.max_train_steps):
                weights[step] = exported(engine)

        data = two_ranks.training_data(tiny_pipeline, buckets=buckets)
        curve = two_ranks.curve_of(engine, data, config, after=keep)
        return {"curve": curve, "state": engine.state_dict(), "weights": weights}

    return run


def exported(engine: TorchEngine) -> dict[str, Tensor]:
    """The weights as they are, not their moving average, under the names of the export."""
    return engine.model.exported({name: p.detach().clone() for name, p in engine.model.named_parameters()})


def column(curve: list[dict[str, float]], name: str) -> list[float]:
    return [step[name] for step in curve]


def distance(one: dict[str, Tensor], other: dict[str, Tensor], owner: str) -> float:
    """Euclidean distance of all weights of a component."""
    return float(sum((one[name] - other[name]).square().sum() for name in one if name.startswith(owner)) ** 0.5)


@pytest.mark.parametrize("case", [case.name for case in two_ranks.CASES])
class TestLikeOneWorker:
    @pytest.fixture
    def pair(
        self, results: dict[str, Any], one_worker: Callable[..., dict[str, Any]], case: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        return results[case], one_worker(
            accumulates=case.endswith("accumulation"),
            buckets="buckets" in case,
            optimizer="adafactor" if "adafactor" in case else "adamw",
        )

    @pytest.mark.parametrize("name", ["loss", "instance_loss", "prior_loss"])
    def test_the_losses(self, pair: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
        got, expected = (column(result["curve"], name) for result in pair)
        assert len(got) in (two_ranks.STEPS, two_ranks.FEW_STEPS)
        assert got == pytest.approx(expected, rel=1e-4)

    def test_the_gradient_norms(self, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
        """Adam hides a gradient that is too large by a factor; this doesn't."""
        got, expected = (column(result["curve"], "grad_norm") for result in pair)
        assert got == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("name", ["learning_rate", "text_encoder_learning_rate"])
    def test_the_learning_rates(self, pair: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
        got, expected = (column(result["curve"], name) for result in pair)
        assert got == expected
        assert max(got) == pytest.approx(1e-3 if name == "learning_rate" else 1e-4)

    @pytest.mark.parametrize("owner", ["denoiser", "text_encoder.encoder", "text_encoder.embeddings"])
    def test_the_exported_weights(self, pair: tuple[dict[str, Any], dict[str, Any]], owner: str, case: str) -> None:
        """In the long runs, their moving average. Each component, and the identifier, moves by a rate of its own."""
        got, expected = pair
        assert got["state"].keys() == expected["state"].keys()
        assert all(tensor.dtype is torch.float32 for tensor in got["state"].values())
        assert {n: t.shape for n, t in got["state"].items()} == {n: t.shape for n, t in expected["weights"][0].items()}
        moved = distance(expected["state"], expected["weights"][0], owner)
        state = got["state"]
        if "adafactor" in case:
            # The gradient of a key's bias is rounding alone, which Adafactor's step makes as large as any other.
            state = {name: tensor for name, tensor in state.items() if not name.endswith("k_proj.bias")}
        assert distance(state, expected["state"], owner) < 1e-3 * moved
        # The average of a long run lags behind, so an export of the wrong tensors shows.
        if len(got["curve"]) == two_ranks.STEPS:
            last = expected["weights"][two_ranks.STEPS]
            assert distance(last, expected["state"], owner) > 0.03 * moved
            assert distance(got["last"], last, owner) < 1e-3 * moved


@pytest.mark.parametrize("case", [case.name for case in two_ranks.CASES if case.resumes])
def test_a_resume_is_bit_for_bit(results: dict[str, Any], case: str) -> None:
    check_resume(results[case], case)


@pytest.mark.extras("torchao")
def test_moments_in_eight_bits(tiny_pipeline: Path, tmp_path: Path, one_worker: Callable[..., dict[str, Any]]) -> None:
    """Both ranks make the same updates, and go on with the same codes and scales."""
    case = two_ranks.EIGHT_BIT
    run_ranks(2, tiny_pipeline, tmp_path, case.optimizer)
    result = torch.load(tmp_path / f"{case.name}.pt", weights_only=True)
    check_resume(result, case.name)
    expected = one_worker(accumulates=True, optimizer=case.optimizer)
    for name in ("loss", "grad_norm"):
        assert column(result["curve"], name) == pytest.approx(column(expected["curve"], name), rel=1e-3)


def check_resume(result: dict[str, Any], case: str) -> None:
    kept = two_ranks.FEW_CHECKPOINT if case.endswith("accumulation") else two_ranks.CHECKPOINT
    assert len(result["resumed_curve"]) == len(result["curve"]) - kept > 0
    assert result["resumed_curve"] == result["curve"][kept:]
    state, resumed = result["state"], result["resumed_state"]
    assert state.keys() == resumed.keys()
    assert [name for name in state if not torch.equal(state[name], resumed[name])] == []


@pytest.mark.parametrize("engine", ENGINES)
class TestEveryEngine:
    def test_rank_0_alone_holds_the_gathered_weights(self, results: dict[str, Any], engine: str) -> None:
        assert results[engine]["kept_by_others"] == 0
        assert len(results[engine]["state"]) > 100

    def test_gathering_changes_nothing(self, results: dict[str, Any], engine: str) -> None:
        state, again = results[engine]["state"], results[engine]["again"]
        assert [name for name in state if not torch.equal(state[name], again[name])] == []


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("engine", [*ENGINES, "zero2-offload-accumulation"])
class TestNumbersThatAreNotFinite:
    """On one of two ranks: both say so at that step, whenever metrics are due, and neither keeps anything of it."""

    @pytest.fixture
    def ranks(self, results: dict[str, Any], engine: str, autocast: bool) -> list[dict[str, Any]]:
        ranks: list[dict[str, Any]] = results["diverging"][engine, autocast]
        assert len(ranks) == 2
        return ranks

    def test_a_gradient(self, ranks: list[dict[str, Any]]) -> None:
        for rank in ranks:
            assert rank["steps"] == list(range(2, two_ranks.POISONED))
            assert f"at step {two_ranks.POISONED}; lower train.learning_rate (it is 0.001)" in rank["fit"]

    def test_nothing_is_kept_of_it(self, ranks: list[dict[str, Any]]) -> None:
        for rank in ranks:
            assert [f"not finite at step {two_ranks.POISONED}" in said for said in rank["after"]] == [True, True]

    def test_a_moment(self, ranks: list[dict[str, Any]]) -> None:
        """Which stops its weight for ever, while losses and gradients go on."""
        for rank in ranks:
            assert ["moments are not finite after step 1" in said for said in rank["moment"]] == [True, True]
            assert rank["healthy"] == "nothing"
        # A snapshot's maker looks at what it copies; StoredCheckpoints tells the other ranks.
        assert ["moments are not finite after step 1" in rank["snapshot"] for rank in ranks] == [False, True]


@pytest.mark.parametrize("engine", ENGINES)
class TestFewerAndMoreRanks:
    """From two ranks to one and back, by checkpoints: the run that nothing happened to, up to float rounding."""

    @pytest.mark.parametrize("name", ["loss", "instance_loss", "prior_loss", "grad_norm"])
    def test_the_curve(
        self, resized: dict[str, Any], one_worker: Callable[..., dict[str, Any]], engine: str, name: str
    ) -> None:
        expected = column(one_worker(accumulates=False)["curve"], name)[: RESIZED[-1][1]]
        assert column(resized[engine]["curve"], name) == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("name", ["learning_rate", "text_encoder_learning_rate"])
    def test_the_learning_rates(
        self, resized: dict[str, Any], one_worker: Callable[..., dict[str, Any]], engine: str, name: str
    ) -> None:
        expected = column(one_worker(accumulates=False)["curve"], name)[: RESIZED[-1][1]]
        assert column(resized[engine]["curve"], name) == expected

    @pytest.mark.parametrize("owner", ["denoiser", "text_encoder.encoder", "text_encoder.embeddings"])
    def test_the_weights(
        self, resized: dict[str, Any], one_worker: Callable[..., dict[str, Any]], engine: str, owner: str
    ) -> None:
        """State of each parameter group: its moments, rate and weight decay have gone along."""
        weights = one_worker(accumulates=False)["weights"]
        expected = weights[RESIZED[-1][1]]
        moved = distance(expected, weights[0], owner)
        assert distance(resized[engine]["state"], expected, owner) < 1e-3 * moved


def test_slices_are_the_model_that_is_loaded_whole(results: dict[str, Any]) -> None:
    """Bit by bit: the same values are added in the same order."""
    slices, whole = results["zero3-accumulation"], results["zero3-whole-accumulation"]
    assert slices["curve"] == whole["curve"]
    assert slices["state"].keys() == whole["state"].keys()
    assert all(torch.equal(value, whole["state"][name]) for name, value in slices["state"].items())
