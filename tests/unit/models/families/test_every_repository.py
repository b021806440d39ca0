"""Every family's repositories as they are found, and as they are published: files in, files out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replicas.plain import plain_pipeline
from safetensors.torch import load_file, save_file

from dreambooth.errors import InputError
from dreambooth.models.base_model import pipeline_files, resolve_base_model
from dreambooth.models.delta import rebuild, write_delta
from dreambooth.models.export import export_pipeline, verify_export
from dreambooth.models.families import Component, family_of
from dreambooth.models.probe import Trained
from dreambooth.sampling.sampler import load_pipeline, load_trained, sample
from dreambooth.training.model import load_model

SIDE = 64
SIZE = {"height": SIDE, "width": SIDE}
PROMPT = "a photo of sks dog"


@pytest.fixture
def trained(base: Path, config: Any) -> Trained:
    """Every trained weight of every text encoder and the denoiser, moved a little."""
    model = load_model(base, config("train.text_encoders=all"))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.exported({name: parameter.detach() for name, parameter in model.named_parameters()})


def drawn(pipeline: Any) -> Any:
    """A picture (H, W, 3)."""
    sampling = {"num_inference_steps": 2, "guidance_scale": 3.0, "dtype": torch.float32}
    return np.asarray(sample(pipeline, [PROMPT], [5], **sampling, **SIZE)[0], dtype=int)


def parts(base: Path) -> list[Component]:
    """Components with weights."""
    every = [part for part in family_of(base).components if part.weights is not None]
    return [part for part in every if (base / part.folder).is_dir()]


class TestPublication:
    def test_plain_diffusers_samples_the_picture_of_the_trained_weights(
        self, base: Path, trained: Trained, tmp_path: Path
    ) -> None:
        export_pipeline(base, trained, tmp_path / "model", resolution=SIDE)
        verify_export(tmp_path / "model", base, trained, dtype=torch.float32)
        pipeline = load_trained(base, trained, device="cpu", dtype=torch.float32)
        plain = plain_pipeline(tmp_path / "model")
        expected = drawn(pipeline)
        assert abs(drawn(load_pipeline(tmp_path / "model")) - expected).max() <= 1
        assert abs(drawn(load_pipeline(base)) - expected).max() > 1
        plain.scheduler = pipeline.scheduler
        found = plain(
            PROMPT,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(5),
            **family_of(base).call_arguments(3.0),
            **SIZE,
        )
        assert abs(np.asarray(found.images[0], dtype=int) - expected).max() <= 1

    def test_the_index_names_no_part_that_is_missing(self, base: Path, trained: Trained, tmp_path: Path) -> None:
        export_pipeline(base, trained, tmp_path / "model")
        index = json.loads((tmp_path / "model" / "model_index.json").read_text())
        named = {name for name, value in index.items() if isinstance(value, list) and value != [None, None]}
        folders = {path.name for path in (tmp_path / "model").iterdir() if path.is_dir()}
        assert named == folders == {part.folder for part in family_of(base).components if (base / part.folder).is_dir()}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_change_against_the_base_is_exact(
        self, base: Path, trained: Trained, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        export_pipeline(base, trained, tmp_path / "model", dtype=dtype)
        found = resolve_base_model(str(base))
        write_delta(found, tmp_path / "model", tmp_path / "delta")
        rebuild(tmp_path / "delta", tmp_path / "again", found)
        for path in (tmp_path / "model").rglob("*"):
            again = tmp_path / "again" / path.relative_to(tmp_path / "model")
            assert path.is_dir() or path.read_bytes() == again.read_bytes()

    def test_a_wrong_tensor_is_named(self, base: Path, trained: Trained, tmp_path: Path) -> None:
        for folder in {family_of(base).denoiser.folder, *(part.folder for part in family_of(base).text_encoders(base))}:
            target = tmp_path / folder
            export_pipeline(base, trained, target)
            (file,) = (target / folder).glob("*.safetensors")
            tensors = load_file(file)
            name = min(name for name in tensors if name.endswith("weight") and "embed_tokens" not in name)
            tensors[name] = tensors[name] + 1e-3
            save_file(tensors, file, {"format": "pt"})
            with pytest.raises(ValueError, match=f"{name} in .* is not what was trained"):
                verify_export(target, base, trained, dtype=torch.float32)


def half_precision_alone(folder: Path) -> None:
    """`variant: fp16`, with nothing beside."""
    for part in parts(folder):
        module = part.load_class().from_pretrained(folder / part.folder, dtype=torch.float16)
        for path in (*(folder / part.folder).glob("*.safetensors"), *(folder / part.folder).glob("*.index.json")):
            path.unlink()
        module.save_pretrained(folder / part.folder, variant="fp16")


def half_precision_beside(folder: Path) -> None:
    for part in parts(folder):
        for path in (folder / part.folder).glob("*.safetensors"):
            shutil.copyfile(path, path.with_name(f"{path.stem}.fp16.safetensors"))


def in_shards(folder: Path) -> None:
    for part in parts(folder):
        module = part.load_class().from_pretrained(folder / part.folder)
        for path in (folder / part.folder).glob("*.safetensors"):
            path.unlink()
        module.save_pretrained(folder / part.folder, max_shard_size="30KB")
    assert list(folder.rglob("*.safetensors.index.json"))


def other_formats_beside(folder: Path) -> None:
    """A checkpoint in a single file, and what ONNX, Flax and pickles left."""
    for part in parts(folder):
        for name in ("model.onnx", "model.onnx_data", "flax_model.msgpack", "pytorch_model.bin"):
            (folder / part.folder / name).write_bytes(b"not to be read")
    save_file({"whole": torch.zeros(3)}, folder / "whole_model.safetensors")
    (folder / "whole_model.ckpt").write_bytes(b"not to be read")
    (folder / "onnx").mkdir()


FOUND: dict[str, tuple[Callable[[Path], None], float]] = {
    "half precision alone": (half_precision_alone, 16),
    "half precision beside": (half_precision_beside, 0),
    "in shards": (in_shards, 0),
    "other formats beside": (other_formats_beside, 0),
}
"""What a repository may be like, and how far a picture may be from the plain one's, of 255."""


@pytest.mark.parametrize("found", FOUND)
def test_a_repository_is_read_as_it_is(base: Path, config: Any, tmp_path: Path, found: str) -> None:
    make, off = FOUND[found]
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    make(folder)
    resolved, usual = resolve_base_model(str(folder)), resolve_base_model(str(base))
    assert resolved.parameter_counts == usual.parameter_counts
    assert (resolved.hash == usual.hash) == found.endswith("beside")
    assert {path.suffix for path in pipeline_files(folder)} <= {".json", ".txt", ".model", ".safetensors"}
    assert abs(drawn(load_pipeline(folder)) - drawn(load_pipeline(base))).max() <= off
    # What is published of it has the plain names, which every library looks for.
    model = load_model(folder, config("train.text_encoders=none"))
    state = model.exported({name: parameter.detach() for name, parameter in model.named_parameters()})
    export_pipeline(folder, state, tmp_path / "model")
    verify_export(tmp_path / "model", folder, state, dtype=torch.float32)
    assert abs(drawn(load_pipeline(tmp_path / "model")) - drawn(load_pipeline(folder))).max() <= 1
    assert plain_pipeline(tmp_path / "model").components


def test_a_scheduler_of_another_process_is_refused(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    path = folder / "scheduler" / "scheduler_config.json"
    other = "FlowMatchEulerDiscreteScheduler" if family_of(base).noise == "diffusion" else "DDIMScheduler"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": other}))
    with pytest.raises(InputError, match=rf"scheduler_config\.json.*{other}.*expected a scheduler of "):
        resolve_base_model(str(folder))
