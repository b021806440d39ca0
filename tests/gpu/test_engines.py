"""Every engine on one CUDA device: the losses of a CPU, bf16 that leaves the masters in fp32, and resumes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks

from dreambooth.training.engine import TorchEngine
from dreambooth.training.model import load_model
from pipelines.worker.behind import Behind

pytestmark = pytest.mark.filterwarnings("default")  # DeepSpeed uses what PyTorch deprecates

ENGINES = [
    two_ranks.Case(stage=stage, offload=offload)
    for stage, offload in ((None, False), (0, False), (1, False), (2, False), (3, False), (2, True))
]
# With ZeRO-3 ranks read slices of the weights, unless the model is loaded whole before; blocks are gathered at once.
ENGINES += [two_ranks.Case(stage=3, whole=True), two_ranks.Case(stage=3, blocks=True)]
COLUMNS = ("loss", "instance_loss", "prior_loss", "grad_norm")


def values(curve: list[dict[str, float]]) -> torch.Tensor:
    return torch.tensor([[step[name] for name in COLUMNS] for step in curve])


@pytest.fixture(scope="module")
def on_cpu(tiny_pipeline: Path) -> list[dict[str, float]]:
    config = two_ranks.configuration(tiny_pipeline, accumulation=1, accumulates=False)
    engine = TorchEngine(load_model(tiny_pipeline, config), config.train)
    return two_ranks.curve_of(engine, two_ranks.training_data(tiny_pipeline), config)


@pytest.fixture
def train(tiny_pipeline: Path) -> Callable[..., Any]:
    def run(case: two_ranks.Case, *, start: int = 0, load: Path | None = None, save: Path | None = None) -> Any:
        config = two_ranks.configuration(tiny_pipeline, accumulation=1, accumulates=False)
        engine = two_ranks.engine_of(tiny_pipeline, config, case, "cuda")

        written: list[Behind] = []

        def after(step: int) -> None:
            if save is not None and step == two_ranks.CHECKPOINT:
                written.append(Behind(partial(two_ranks.write_late, engine.snapshot(), save)))

        try:
            if load is not None:
                engine.load(load)
            data = two_ranks.training_data(tiny_pipeline)
            curve = two_ranks.curve_of(engine, data, config, start=start, after=after)
            for each in written:
                each.result()
            return curve, engine.state_dict()
        finally:
            engine.close()

    return run


@pytest.mark.usefixtures("full_fp32")
@pytest.mark.parametrize("case", ENGINES, ids=lambda case: case.name)
class TestEveryEngine:
    def test_trains_as_a_cpu_does(self, case: Any, train: Callable[..., Any], on_cpu: list[dict[str, float]]) -> None:
        curve, state = train(case)
        torch.testing.assert_close(values(curve), values(on_cpu), rtol=5e-3, atol=1e-5)
        assert all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in state.values())

    def test_goes_on_from_a_checkpoint(self, case: Any, train: Callable[..., Any], tmp_path: Path) -> None:
        whole, state = train(case, save=tmp_path)
        rest, resumed = train(case, load=tmp_path, start=two_ranks.CHECKPOINT)
        # Sums of many threads on a GPU come in any order, so not to the last bit.
        torch.testing.assert_close(values(rest), values(whole[two_ranks.CHECKPOINT :]), rtol=1e-3, atol=1e-6)
        assert resumed.keys() == state.keys()
        # Of all weights together: Adam makes steps of a gradient that is nothing but rounding, too.
        apart = sum((resumed[name] - tensor).square().sum() for name, tensor in state.items()) ** 0.5
        size = sum(tensor.square().sum() for tensor in state.values()) ** 0.5
        assert apart < 1e-3 * size


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_weights_have_exact_masters(
    stage: int, train: Callable[..., Any], tiny_pipeline: Path, on_cpu: list[dict[str, float]], tmp_path: Path
) -> None:
    case = two_ranks.Case(stage=stage, bf16=True)
    config = two_ranks.configuration(tiny_pipeline, accumulation=1, accumulates=False)
    engine = two_ranks.engine_of(tiny_pipeline, config, case, "cuda")
    start = engine.state_dict()
    engine.close()
    plain = TorchEngine(load_model(tiny_pipeline, config), config.train).state_dict()
    assert [name for name in plain if not torch.equal(start[name], plain[name])] == []
    whole, _ = train(case, save=tmp_path)
    rest, _ = train(case, load=tmp_path, start=two_ranks.CHECKPOINT)
    torch.testing.assert_close(values(whole)[:, 0], values(on_cpu)[:, 0], rtol=5e-2, atol=1e-3)
    torch.testing.assert_close(values(rest), values(whole[two_ranks.CHECKPOINT :]), rtol=1e-2, atol=1e-4)


def test_bf16_products_leave_masters_and_gradients_in_fp32(tiny_pipeline: Path, on_cpu: list[dict[str, float]]) -> None:
    config = two_ranks.configuration(tiny_pipeline, accumulation=1, accumulates=False)
    engine = TorchEngine(load_model(tiny_pipeline, config, autocast=True), config.train, "cuda")
    data = two_ranks.training_data(tiny_pipeline)
    engine.backward(engine(data.batch(range(1))).total)
    assert {p.dtype for p in engine.parameters} == {torch.float32}
    assert {p.grad.dtype for p in engine.parameters if p.grad is not None} == {torch.float32}
    engine.step()
    fresh = TorchEngine(load_model(tiny_pipeline, config, autocast=True), config.train, "cuda")
    curve = two_ranks.curve_of(fresh, data, config)
    losses, exact = values(curve)[:, 0], values(on_cpu)[:, 0]
    assert not torch.equal(losses, exact)
    torch.testing.assert_close(losses, exact, rtol=3e-2, atol=1e-3)


def test_a_checkpoint_is_loaded_through_host_memory(tiny_pipeline: Path, tmp_path: Path) -> None:
    config = two_ranks.configuration(tiny_pipeline, accumulation=1, accumulates=False, ema_decay=None)
    trained, loading = (TorchEngine(load_model(tiny_pipeline, config), config.train, "cuda") for _ in range(2))
    trained.backward(trained(two_ranks.training_data(tiny_pipeline).batch(range(1))).total)
    trained.step()
    trained.save(tmp_path)
    moments = sum(moment.nbytes for state in trained.optimizer.state.values() for moment in state.values())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]  # those allocated are rounded up for each tensor
    loading.load(tmp_path)
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before < 1.1 * moments
