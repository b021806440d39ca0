"""The planned memory of a step that is captured as CUDA graphs, whose gradients stay."""

import pytest
from full_size import plan_of

from pipelines.plan.memory import beside_pipeline_bytes, peak_bytes, sampling_peak


def peaks(*overrides: str, gpus: int) -> tuple[int, int]:
    """Without graphs and with them."""
    off, auto = (
        peak_bytes(plan_of("engine=torch", f"train.graph={graph}", *overrides, gpus=gpus)) for graph in ("off", "auto")
    )
    return off, auto


def test_a_captured_step_takes_more() -> None:
    off, auto = peaks(gpus=1)
    gradients = 4 * plan_of(gpus=1).trained_parameters
    assert off < auto <= off + gradients


def test_captured_steps_stay_beside_the_samples_that_are_made() -> None:
    off, auto = (plan_of("engine=torch", f"train.graph={graph}", gpus=1) for graph in ("off", "auto"))
    assert beside_pipeline_bytes(auto) == peak_bytes(auto) + sampling_peak(auto) > beside_pipeline_bytes(off)


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [((), 0), (("cluster.num_workers=2",), 2), (("train.gradient_checkpointing=true",), 1)],
    ids=["CPU", "two workers", "checkpointing"],
)
def test_what_is_not_captured_takes_what_it_took(overrides: tuple[str, ...], gpus: int) -> None:
    off, auto = peaks(*overrides, gpus=gpus)
    assert auto == off
