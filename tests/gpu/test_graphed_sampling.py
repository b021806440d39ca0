"""Captured steps of a sampler on one CUDA device: the pictures of plain steps, for subjects in one memory."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dreambooth.models.export import put_weights
from dreambooth.sampling.graphs import Graphs
from dreambooth.sampling.pictures import Pictures
from dreambooth.sampling.sampler import load_pipeline, sample

CARS = ["a photo of a car", "a photo of a red car", "a car on the beach"]
DOGS = ["a photo of a dog", "two dogs", "a dog in the snow"]


def drawn(pipeline: Any, prompts: list[str], graphs: Graphs | None) -> npt.NDArray[np.int16]:
    settings: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 4.0, "height": 64, "width": 64}
    images = sample(pipeline, prompts, range(len(prompts)), batch_size=2, graphs=graphs, **settings)
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_replays_draw_what_plain_steps_draw(tiny_pipeline: Path, dtype: torch.dtype) -> None:
    pipeline, said = load_pipeline(tiny_pipeline, device="cuda", dtype=dtype), list[str]()
    graphs = Graphs("cuda", said.append)
    for moved in (1.0, 1.02):
        put_weights(pipeline, {f"denoiser.{name}": moved * weight for name, weight in pipeline.unet.named_parameters()})
        for prompts in (CARS, DOGS, CARS):
            apart = np.abs(drawn(pipeline, prompts, graphs) - drawn(pipeline, prompts, None))
            assert apart.max() <= 1  # by rounding: a library may choose other kernels
    assert said == []
    assert graphs.captures == 2  # of two pictures, and of one: the next weights lie where the last ones did
    assert graphs.captured == 2


def test_pictures_are_copied_while_the_host_goes_on() -> None:
    pixels = torch.rand(4, 3, 256, 256, device="cuda") * 2 - 1
    pictures = Pictures(pixels)
    expected = ((pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy() * 255).round()
    pixels.zero_()  # comes after the copy on the same stream
    for place, picture in enumerate(pictures):
        assert np.array_equal(np.asarray(picture), expected[place])
    pixels[2, 0, 0, 0] = float("nan")
    damaged = Pictures(pixels)
    assert np.asarray(damaged[1]).std() == 0
    with pytest.raises(RuntimeError, match="not numbers"):
        damaged[2]
