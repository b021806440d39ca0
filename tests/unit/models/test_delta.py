"""Models kept as their change against the base: exact in every published dtype, and only against that base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth.errors import InputError
from dreambooth.models.base_model import BaseModel, resolve_base_model
from dreambooth.models.delta import DESCRIPTION, is_delta, rebuild, write_delta
from dreambooth.models.export import export_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def base(tiny_pipeline: Path) -> BaseModel:
    return resolve_base_model(str(tiny_pipeline))


def fine_tuned(base: BaseModel, target: Path, dtype: torch.dtype, *, scale: float = 1e-4) -> Path:
    """A model whose weights moved a little, with every value in it that a float can have."""
    rng = torch.Generator().manual_seed(0)
    state = {}
    for owner, component in (("denoiser", "unet"), ("text_encoder", "text_encoder")):
        (path,) = (base.directory / component).glob("*.safetensors")
        for name, tensor in load_file(path).items():
            moved = tensor.float() + scale * torch.randn(tensor.shape, generator=rng)
            state[f"{owner}.{name}"] = moved
    first = next(name for name, tensor in state.items() if tensor.numel() >= 8)
    odd = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-7, -1e-7, 6e4]
    state[first].view(-1)[:8] = torch.tensor(odd)
    export_pipeline(base.directory, state, target, dtype=dtype)
    return target


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def size(directory: Path) -> int:
    return sum(map(len, contents(directory).values()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_comes_back_bit_for_bit(base: BaseModel, tmp_path: Path, dtype: torch.dtype) -> None:
    model = fine_tuned(base, tmp_path / "model", dtype)
    write_delta(base, model, tmp_path / "delta")
    assert is_delta(tmp_path / "delta")
    assert not is_delta(model)
    assert contents(rebuild(tmp_path / "delta", tmp_path / "copy")) == contents(model)


def test_the_manifest_of_a_published_model_is_no_part_of_it(base: BaseModel, tmp_path: Path) -> None:
    model = fine_tuned(base, tmp_path / "model", torch.float16)
    expected = contents(model)
    (model / "manifest.json").write_text("{}")
    write_delta(base, model, tmp_path / "delta")
    assert not (tmp_path / "delta" / "manifest.json").exists()
    description = json.loads((tmp_path / "delta" / DESCRIPTION).read_text())
    description["files"]["manifest.json"] = {"sha256": "0" * 64, "kept": "whole"}  # as earlier versions wrote it
    (tmp_path / "delta" / DESCRIPTION).write_text(json.dumps(description))
    assert contents(rebuild(tmp_path / "delta", tmp_path / "copy")) == expected


def test_less_change_takes_less_room_and_the_base_none(base: BaseModel, tmp_path: Path) -> None:
    sizes = {}
    for scale in (0.0, 1e-6, 1e-2):
        model = fine_tuned(base, tmp_path / f"model-{scale}", torch.float32, scale=scale)
        write_delta(base, model, tmp_path / f"delta-{scale}")
        sizes[scale] = size(tmp_path / f"delta-{scale}" / "unet")
    assert sizes[0.0] < sizes[1e-6] < sizes[1e-2] < (tmp_path / f"model-{1e-2}" / UNET).stat().st_size
    assert not (tmp_path / f"delta-{0.0}" / "vae").exists()


def test_another_base_is_refused(base: BaseModel, tmp_path: Path) -> None:
    write_delta(base, fine_tuned(base, tmp_path / "model", torch.float16), tmp_path / "delta")
    shutil.copytree(base.directory, tmp_path / "other")
    weights = load_file(tmp_path / "other" / UNET)
    weights[next(iter(weights))] += 1
    save_file(weights, tmp_path / "other" / UNET, {"format": "pt"})
    other = resolve_base_model(str(tmp_path / "other"))
    with pytest.raises(InputError, match=f"hash {base.hash}, but .* has hash {other.hash}"):
        rebuild(tmp_path / "delta", tmp_path / "copy", base=other)
    assert not (tmp_path / "copy").exists()


def test_a_damaged_delta_is_found(base: BaseModel, tmp_path: Path) -> None:
    write_delta(base, fine_tuned(base, tmp_path / "model", torch.float16), tmp_path / "delta")
    shutil.copyfile(tmp_path / "model" / "model_index.json", tmp_path / "delta" / "model_index.json")
    path = tmp_path / "delta" / DESCRIPTION
    description = json.loads(path.read_text())
    description["files"][UNET]["sha256"] = "0" * 64
    path.write_text(json.dumps(description))
    with pytest.raises(InputError, match="the delta is damaged"):
        rebuild(tmp_path / "delta", tmp_path / "copy")
    description["files"] = {"../outside": {"kept": "base", "sha256": "0"}}
    path.write_text(json.dumps(description))
    with pytest.raises(InputError, match="plain relative path"):
        rebuild(tmp_path / "delta", tmp_path / "copy")
