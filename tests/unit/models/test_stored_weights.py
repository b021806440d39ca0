"""Components whose weights stay in their files, against the same components loaded whole."""

import json
import re
from pathlib import Path

import pytest
import torch
from replicas import REPLICAS, built
from safetensors.torch import load_file, save_file
from torch import nn

from dreambooth.config.settings import load_config
from dreambooth.errors import InputError
from dreambooth.models.families import family_of
from dreambooth.models.stored_weights import SliceReader
from dreambooth.training.model import load_components, load_model


@pytest.fixture(scope="module")
def reader() -> SliceReader:
    return SliceReader()


def assert_same(base: Path, folder: str, reader: SliceReader) -> None:
    """The same parameters, in parts of one and of three ranks, and the same buffers."""
    family = family_of(base)
    whole, (module, stored) = family.load(base, folder), family.stored(base, folder)
    parameters = dict(whole.named_parameters())
    assert list(stored) == list(parameters) == [name for name, _ in module.named_parameters()]
    assert all(parameter.is_meta for parameter in module.parameters())
    for name, parameter in parameters.items():
        flat, count = parameter.detach().flatten(), parameter.numel()
        for ranks in (1, 3):
            part = -(-count // ranks)
            bounds = [(min(rank * part, count), min((rank + 1) * part, count)) for rank in range(ranks)]
            read = [reader.read(stored[name], *bound).clone() for bound in bounds]
            assert torch.equal(torch.cat(read).float(), flat), name
    for (name, buffer), (own_name, own) in zip(whole.named_buffers(), module.named_buffers(), strict=True):
        assert (name, buffer.dtype) == (own_name, own.dtype)
        assert torch.equal(buffer, own), name


@pytest.mark.parametrize("name", REPLICAS)
def test_every_family_has_the_values_of_its_files(name: str, tmp_path: Path, reader: SliceReader) -> None:
    base = built(name, tmp_path / "base")
    family = family_of(base)
    for part in (family.denoiser, *family.text_encoders(base)):
        assert_same(base, part.folder, reader)


def test_a_variant_in_half_precision_alone(tmp_path: Path, reader: SliceReader) -> None:
    base = built("stable-diffusion-1.5", tmp_path / "base")
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(halves, path.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
    path.unlink()
    assert_same(base, "unet", reader)


def test_shards(tmp_path: Path, reader: SliceReader) -> None:
    base = built("stable-diffusion-1.5", tmp_path / "base")
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, places = load_file(path), {}
    for place, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        shard = f"diffusion_pytorch_model-0000{place}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, path.with_name(shard), {"format": "pt"})
        places |= dict.fromkeys(names, shard)
    path.unlink()
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same(base, "unet", reader)


def test_names_that_only_the_library_knows_are_loaded_whole(tmp_path: Path) -> None:
    base = built("stable-diffusion-1.5", tmp_path / "base")
    path = base / "text_encoder" / "model.safetensors"
    expected = load_components(base).text_encoders["text_encoder"]
    save_file({f"clip.{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    module, stored = family_of(base).stored(base, "text_encoder")
    assert stored == {}
    assert not any(parameter.is_meta for parameter in module.parameters())
    assert type(module) is type(expected)


def test_an_embedding_that_starts_as_the_class_noun_reads_its_rows(tiny_pipeline: Path) -> None:
    subject = {"name": "rex", "class_noun": "dog", "identifier": "tfz", "instance_images": "photos"}
    train = {"method": "textual_inversion"}
    config = load_config({"base_model": str(tiny_pipeline), "subject": subject, "train": train})
    changes: list[nn.Parameter] = [
        load_model(tiny_pipeline, config, whole=whole).identifier_embeddings["text_encoder"].change  # type: ignore[misc]
        for whole in (True, False)
    ]
    assert changes[0].abs().max() > 0
    assert torch.equal(changes[0], changes[1])


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    """Before it is looked into, and afterwards, when a rank reads its part."""
    base = built("stable-diffusion-1.5", tmp_path / "base")
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    _, stored = family_of(base).stored(base, "unet")
    path.write_bytes(path.read_bytes()[:-1000])
    named = rf"{re.escape(str(path))} is damaged: .*; copy it again"
    with pytest.raises(InputError, match=named):
        load_components(base, whole=False)
    with pytest.raises(InputError, match=named):
        SliceReader().read(next(iter(stored.values())), 0, 1)
