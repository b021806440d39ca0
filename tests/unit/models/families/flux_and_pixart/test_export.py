"""What is exported of FLUX.1 and PixArt-Sigma samples the same everywhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flux_and_pixart_runs import PROMPTS, SIDE, config_of, plain_arguments, plain_pipeline, t5
from processor import multiplies_bf16
from served import Served
from torch import Tensor

from dreambooth.models.base_model import BaseModel, resolve_base_model
from dreambooth.models.delta import rebuild, write_delta
from dreambooth.models.export import export_pipeline, verify_export
from dreambooth.sampling.sampler import load_pipeline, load_trained, sample
from dreambooth.training.model import load_model


def trained(base: Path, **train: Any) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        name: parameter.detach() + 0.02 * torch.randn(parameter.shape, generator=rng)
        for name, parameter in load_model(base, config_of(base, **train)).named_parameters()
    }


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # older versions know no other name
def test_an_export_samples_the_same_in_plain_diffusers_and_mlflow_and_is_stored_as_a_delta(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, model = trained(base), tmp_path / "model"
    export_pipeline(base, state, model, resolution=SIDE)
    verify_export(model, base, state, dtype=torch.float32)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": SIDE, "width": SIDE}
    ours = load_trained(base, state, device="cpu", dtype=torch.float32)
    expected = sample(ours, PROMPTS, [5, 6], dtype=torch.float32, **settings)
    plain = plain_pipeline(model)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    pictures = plain(PROMPTS, generator=generators, **settings, **plain_arguments(plain)).images
    # Its own size, where nothing says another.
    assert BaseModel(address=str(model), revision=None, directory=model).resolution == SIDE
    multiplies_bf16(monkeypatch, False)
    pictures += Served(model).pictures(PROMPTS, seed=5, num_inference_steps=2, guidance_scale=3.0)
    # MKL rounds by where weights lie, and these were loaded, those put in.
    for picture, same in zip(pictures, expected * 2, strict=True):
        assert np.abs(np.asarray(picture, dtype=np.int16) - np.asarray(same, dtype=np.int16)).max() <= 1
    write_delta(resolve_base_model(str(base)), model, tmp_path / "delta")
    rebuilt = rebuild(tmp_path / "delta", tmp_path / "rebuilt")
    assert {p.relative_to(rebuilt): p.read_bytes() for p in rebuilt.rglob("*.safetensors")} == {
        p.relative_to(model): p.read_bytes() for p in model.rglob("*.safetensors")
    }


def test_an_export_with_a_wrong_tensor_is_found(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state, model = trained(base, text_encoders="all"), tmp_path / "model"
    export_pipeline(base, state, model)
    verify_export(model, base, state, dtype=torch.float32)
    path = model / t5(base).pop() / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("wo.weight"))
    save_file(tensors | {name: tensors[name] + 0.5}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="is not what was trained"):
        verify_export(model, base, state, dtype=torch.float32)


def test_a_size_of_its_own_is_that_of_its_pictures(dev: Path, tmp_path: Path) -> None:
    state = trained(dev, text_encoders="none")
    export_pipeline(dev, state, tmp_path / "model", resolution=96)
    pipeline = load_pipeline(tmp_path / "model")
    pictures = sample(pipeline, PROMPTS[:1], [0], num_inference_steps=1, guidance_scale=1)
    assert pictures[0].size == (96, 96)
