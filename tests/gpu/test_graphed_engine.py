"""The captured step on one CUDA device: the plain engine's losses, from graphs, for subjects in one memory."""

from functools import partial
from pathlib import Path

import pytest
import torch
import two_ranks

from dreambooth.errors import Diverged
from dreambooth.fixed_tensors import CaptureMemory, Replayed
from dreambooth.training.engine import TorchEngine
from dreambooth.training.graphed_engine import FixedStep, GraphedEngine
from dreambooth.training.model import load_model
from pipelines.worker.behind import Behind

pytestmark = pytest.mark.usefixtures("full_fp32")
COLUMNS = ("loss", "instance_loss", "prior_loss", "grad_norm")


def values(curve: list[dict[str, float]]) -> torch.Tensor:
    return torch.tensor([[step[name] for name in COLUMNS] for step in curve])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_graphs_train_as_the_plain_engine_does(tiny_pipeline: Path, accumulation: int, autocast: bool) -> None:
    config = two_ranks.configuration(tiny_pipeline, accumulation=accumulation, accumulates=False)
    data, failures = two_ranks.training_data(tiny_pipeline), list[str]()
    plain = TorchEngine(load_model(tiny_pipeline, config, autocast=autocast), config.train, "cuda")
    expected, weights = values(two_ranks.curve_of(plain, data, config)), plain.state_dict()
    step = FixedStep("cuda", failures.append)
    for _ in range(3):
        engine = GraphedEngine(load_model(tiny_pipeline, config, autocast=autocast), config.train, "cuda", step)
        curve, state = values(two_ranks.curve_of(engine, data, config)), engine.state_dict()
        assert failures == []
        assert step.gradients.captured
        assert step.update.captured
        # Not to the last bit: sums of many threads come in any order, and the device takes learning rates in fp32.
        torch.testing.assert_close(curve, expected, rtol=3e-2 if autocast else 5e-3, atol=1e-3 if autocast else 1e-5)
        apart = sum((state[name] - tensor).square().sum() for name, tensor in weights.items()) ** 0.5
        assert apart < 1e-3 * sum(tensor.square().sum() for tensor in weights.values()) ** 0.5


@pytest.mark.parametrize("then", ["captured", "plain"])
def test_goes_on_from_a_snapshot(tiny_pipeline: Path, tmp_path: Path, then: str) -> None:
    """With the moving average, made while the next steps are replayed, and loaded where another subject's lay."""
    config = two_ranks.configuration(tiny_pipeline, accumulation=1, accumulates=False)
    data, step = two_ranks.training_data(tiny_pipeline), FixedStep("cuda", pytest.fail)
    engine, written = GraphedEngine(load_model(tiny_pipeline, config), config.train, "cuda", step), list[Behind]()

    def after(number: int) -> None:
        if number == 1:
            engine.reserve_snapshot()
        elif number == two_ranks.CHECKPOINT:
            assert step.update.captured
            written.append(Behind(partial(two_ranks.write_late, engine.snapshot(), tmp_path)))

    whole = values(two_ranks.curve_of(engine, data, config, after=after))
    written[0].result()
    expected = engine.state_dict()
    model = load_model(tiny_pipeline, config)
    resumed = (
        GraphedEngine(model, config.train, "cuda", step)
        if then == "captured"
        else TorchEngine(model, config.train, "cuda")
    )
    resumed.load(tmp_path)
    rest = values(two_ranks.curve_of(resumed, data, config, start=two_ranks.CHECKPOINT))
    torch.testing.assert_close(rest, whole[two_ranks.CHECKPOINT :], rtol=5e-3, atol=1e-5)
    state = resumed.state_dict()
    apart = sum((state[name] - tensor).square().sum() for name, tensor in expected.items()) ** 0.5
    assert apart < 1e-3 * sum(tensor.square().sum() for tensor in expected.values()) ** 0.5


def test_what_is_not_finite_is_found_after_a_replay(tiny_pipeline: Path) -> None:
    config = two_ranks.configuration(tiny_pipeline, accumulation=1, accumulates=False)
    data, step = two_ranks.training_data(tiny_pipeline), FixedStep("cuda", pytest.fail)
    engine = GraphedEngine(load_model(tiny_pipeline, config), config.train, "cuda", step)
    for number in range(8):
        batch = data.batch(range(number, number + 1))
        if number == 6:
            batch = batch._replace(latents=batch.latents * float("nan"))
        engine.backward(engine(batch).total)
        engine.step()
    assert step.gradients.captured
    assert engine.diverged_at() == 7
    with pytest.raises(Diverged, match="not finite at step 7"):
        engine.snapshot()


def test_what_cannot_be_captured_still_runs() -> None:
    total, said = torch.zeros((), device="cuda"), list[str]()

    def waits_for_the_host() -> None:
        total.add_(1 if total.item() >= 0 else 0)

    replayed = Replayed(waits_for_the_host, said.append, CaptureMemory("cuda"))
    for _ in range(8):
        replayed()
    assert total.item() == 8
    assert len(said) == 1
    assert "GiB reserved" in said[0]
    assert not replayed.captured

    def waits_for_nothing() -> None:
        total.add_(1)

    other = Replayed(waits_for_nothing, said.append, CaptureMemory("cuda"))
    for _ in range(6):
        other()
    assert (total.item(), other.captured, len(said)) == (14, True, 1)


def test_captures_use_the_same_memory_in_turns() -> None:
    memory, said, totals = CaptureMemory("cuda"), list[str](), [torch.zeros((), device="cuda") for _ in range(3)]

    def adding(total: torch.Tensor) -> None:
        total.add_(torch.ones(2**24, device="cuda").sum())  # 64 MiB, which nothing needs afterwards

    replayed, reserved = [Replayed(partial(adding, total), said.append, memory) for total in totals], list[int]()
    for one in replayed:
        for _ in range(6):
            one()
        reserved.append(torch.cuda.memory_reserved())
    assert said == []
    assert all(one.captured for one in replayed)
    assert [total.item() for total in totals] == [6 * 2**24] * 3
    assert reserved[-1] - reserved[0] < 2**26
