"""Replayed steps draw what plain ones draw, to the last bit, whatever was drawn before with the same captures."""

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_calls import Recorded

from dreambooth.models.export import put_weights
from dreambooth.models.families import family_of_pipeline
from dreambooth.sampling.graphs import MOST_SHAPES, Graphs, graphs_for
from dreambooth.sampling.sampler import load_pipeline, sample

CARS = ["a photo of a car", "a photo of a red car", "a car on the beach"]
DOGS = ["a photo of a dog", "two dogs", "a dog in the snow"]


@pytest.fixture
def pipeline(tiny_pipeline: Path) -> Any:
    return load_pipeline(tiny_pipeline, device="cpu", dtype=torch.float32)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    monkeypatch.setattr(Recorded, "count", 0)
    monkeypatch.setattr(Recorded, "memories", [])
    return Graphs("cpu", replayed=Recorded)


def drawn(pipeline: Any, prompts: list[str], graphs: Graphs | None, **settings: Any) -> list[bytes]:
    usual: dict[str, Any] = {
        "num_inference_steps": 6,  # the first, three of the warm-up, the captured one, and a replay
        "guidance_scale": 4.0,
        "height": 32,
        "width": 32,
        "batch_size": 2,
        "dtype": torch.float32,
    }
    images = sample(pipeline, prompts, range(len(prompts)), graphs=graphs, **(usual | settings))
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_one_text_after_the_other(pipeline: Any, graphs: Graphs, guidance_scale: float) -> None:
    for prompts in (CARS, DOGS, CARS):
        plain = drawn(pipeline, prompts, None, guidance_scale=guidance_scale)
        assert drawn(pipeline, prompts, graphs, guidance_scale=guidance_scale) == plain
    assert graphs.captures == Recorded.count == 2  # of two pictures, and of one
    assert not any("forward" in vars(module) for module in pipeline.unet.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipeline.unet.modules())


def test_two_guided_pictures_are_not_four_without(pipeline: Any, graphs: Graphs) -> None:
    for guidance_scale, size in ((4.0, 2), (1.0, 4), (4.0, 2)):
        settings: dict[str, Any] = {"guidance_scale": guidance_scale, "batch_size": size}
        prompts = (CARS + DOGS)[:4]
        assert drawn(pipeline, prompts, graphs, **settings) == drawn(pipeline, prompts, None, **settings)
    assert graphs.captures == 2


def test_the_next_subject_has_its_own_weights(pipeline: Any, graphs: Graphs) -> None:
    base = drawn(pipeline, CARS, graphs)
    moved = {f"denoiser.{name}": 1.05 * weight for name, weight in pipeline.unet.named_parameters()}
    own = put_weights(pipeline, moved)  # where the others were
    assert drawn(pipeline, CARS, graphs) == drawn(pipeline, CARS, None) != base
    assert graphs.captures == 2
    put_weights(pipeline, own)
    assert drawn(pipeline, CARS, graphs) == base
    assert graphs.captures == 2


@pytest.mark.parametrize("how", ["assigned", "data"])
def test_weights_at_another_address_are_captured_anew(pipeline: Any, graphs: Graphs, how: str) -> None:
    base = drawn(pipeline, CARS, graphs)
    kept = [weight.data for weight in pipeline.unet.parameters()]  # so that no other can take their places
    if how == "assigned":
        state = {name: 1.05 * weight for name, weight in pipeline.unet.state_dict().items()}
        pipeline.unet.load_state_dict(state, assign=True)
    else:
        for weight in pipeline.unet.parameters():
            weight.data = 1.05 * weight.data
    assert drawn(pipeline, CARS, graphs) == drawn(pipeline, CARS, None) != base
    assert graphs.captures == Recorded.count == 4
    assert len(kept) == len(list(pipeline.unet.parameters()))


def test_one_dtype_after_the_other(pipeline: Any, graphs: Graphs) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):
        assert drawn(pipeline, CARS, graphs, dtype=dtype) == drawn(pipeline, CARS, None, dtype=dtype)


def test_two_denoisers_share_no_capture(pipeline: Any, graphs: Graphs, tiny_pipeline: Path) -> None:
    other = load_pipeline(tiny_pipeline, device="cpu", dtype=torch.float32)
    put_weights(other, {f"denoiser.{name}": 1.05 * weight for name, weight in other.unet.named_parameters()})
    for _ in range(2):
        for each in (pipeline, other):
            assert drawn(each, CARS, graphs) == drawn(each, CARS, None)
    assert graphs.captures == len(Recorded.memories) == 4
    assert len(set(Recorded.memories)) == 1  # a stream each would keep each from what the others have freed
    forgotten = weakref.ref(other.unet)
    del other, each
    gc.collect()
    assert forgotten() is None


def test_few_shapes_are_kept(pipeline: Any, graphs: Graphs) -> None:
    prompts = (2 * (CARS + DOGS))[: MOST_SHAPES + 1]
    plain = {size: drawn(pipeline, prompts[:size], None, batch_size=size) for size in range(1, MOST_SHAPES + 2)}
    for size in (*plain, MOST_SHAPES + 1, 1):
        assert drawn(pipeline, prompts[:size], graphs, batch_size=size) == plain[size]
    assert graphs.captures == MOST_SHAPES + 2  # the first was the oldest, and is captured again


def test_of_two_threads_one_has_no_graphs(pipeline: Any, graphs: Graphs, tiny_pipeline: Path) -> None:
    other = load_pipeline(tiny_pipeline, device="cpu", dtype=torch.float32)
    made: list[list[bytes]] = []
    with graphs.replaying(family_of_pipeline(pipeline), pipeline.unet, guided=True):
        thread = threading.Thread(target=lambda: made.append(drawn(other, CARS, graphs)))
        thread.start()
        thread.join()
    assert made == [drawn(other, CARS, None)]
    assert graphs.captures == 0
    assert drawn(other, CARS, graphs) == made[0]
    assert graphs.captures == 2


def test_after_a_failure_halfway_pictures_are_right(pipeline: Any, graphs: Graphs) -> None:
    plain = drawn(pipeline, DOGS, None)
    drawn(pipeline, CARS, graphs)
    steps = iter(range(3))
    stop = pipeline.scheduler.step

    def failing(*arguments: Any, **named: Any) -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return stop(*arguments, **named)

    pipeline.scheduler.step = failing
    with pytest.raises(KeyboardInterrupt):
        drawn(pipeline, DOGS, graphs)
    del pipeline.scheduler.step
    assert drawn(pipeline, DOGS, graphs) == plain


def test_a_machine_without_a_gpu_says_so() -> None:
    said: list[str] = []
    assert graphs_for("auto", "cpu", said.append) is None
    assert said == ["there is no CUDA device"]
    assert graphs_for("off", "cuda", said.append) is None
    assert len(said) == 1
