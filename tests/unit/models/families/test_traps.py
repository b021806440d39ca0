"""What goes wrong silently with hub repositories and the libraries that read them, for the families that have it.

More of them is tested where it belongs: schedulers of another process, T5's dropout, the dtype of Stable Diffusion 3.
"""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replicas.plain import plain_pipeline
from safetensors.torch import load_file, save_file

from dreambooth.data.identifier import candidates
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.export import export_pipeline, verify_export
from dreambooth.models.families import Component, family_of
from dreambooth.sampling.sampler import load_pipeline, sample
from dreambooth.training.model import load_model

SIDE = 64
ALL = ["stable-diffusion-xl", "stable-diffusion-3.5", "flux-dev", "pixart-sigma", "deepfloyd-if"]
OF_SAMPLERS = {"timestep_spacing"}  # each has another default: it decides how to sample, not what was learnt
WITH_CLIP, WITH_T5 = ALL[:3], ALL[1:]


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """A copy of a replica, to be changed."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


def drawn(directory: Path) -> Any:
    """A picture (H, W, 3)."""
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": SIDE, "width": SIDE}
    picture = sample(load_pipeline(directory), ["a photo of sks dog"], [5], dtype=torch.float32, **settings)[0]
    return np.asarray(picture, dtype=int)


def of_clip(directory: Path) -> list[Component]:
    return [part for part in family_of(directory).text_encoders(directory) if part.kind.startswith("CLIP")]


def older(path: Path, kind: type) -> set[str]:
    """Make a configuration one of an older version: without fields that have the defaults of the class today."""
    config = json.loads(path.read_text())
    defaults = {name: each.default for name, each in inspect.signature(kind).parameters.items()}
    plain = json.loads(json.dumps(defaults, default=str))
    same = {name for name, value in config.items() if name in plain and value == plain[name]} - OF_SAMPLERS
    left = {name: value for name, value in config.items() if name not in same}
    # A field of its own that no class knows any more, or not yet.
    path.write_text(json.dumps(left | {"_diffusers_version": "0.22.0", "of_another_version": True}))
    return same


@pytest.mark.parametrize("base", ALL, indirect=True)
def test_configurations_of_older_versions_mean_the_same(base: Path, copy: Path) -> None:
    import diffusers

    left_out = set()
    for part in family_of(copy).parts(copy):
        if part.library == "diffusers" and part.role != "scheduler":
            left_out |= older(copy / part.folder / "config.json", part.load_class())
    scheduler = copy / "scheduler" / "scheduler_config.json"
    left_out |= older(scheduler, getattr(diffusers, json.loads(scheduler.read_text())["_class_name"]))
    assert len(left_out) > 20
    found, usual = resolve_base_model(str(copy)), resolve_base_model(str(base))
    assert found.resolution == usual.resolution
    family, settings = found.family, {field.key for field in found.family.fields}
    assert [name for name in settings if found.settings.get(name) != usual.settings.get(name)] == []
    noisy = []
    for directory in (copy, base):
        process, rng = family.process(directory, (4, 8, 8)), torch.Generator().manual_seed(0)
        moments = torch.stack([process.draw(rng) for _ in range(8)])
        noisy.append(process.noisy(torch.ones(8, 4, 8, 8), torch.full((8, 4, 8, 8), 2.0), moments))
    assert torch.equal(*noisy)
    assert np.array_equal(drawn(copy), drawn(base))


@pytest.mark.parametrize("base", WITH_CLIP, indirect=True)
def test_clips_weights_have_either_name(base: Path, copy: Path, config: Any, tmp_path: Path) -> None:
    """`text_model.` stands before the names in most files, and not in those that transformers 5 writes."""
    names = {}
    for part in of_clip(copy):
        path = copy / part.folder / "model.safetensors"
        weights = {name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}
        assert weights.keys() != load_file(path).keys()
        save_file(weights, path, {"format": "pt"})
        names[part.folder] = weights.keys()
    assert np.array_equal(drawn(copy), drawn(base))
    model = load_model(copy, config("train.text_encoders=all"))
    state = model.exported({name: each.detach() for name, each in model.named_parameters()})
    export_pipeline(copy, state, tmp_path / "model")
    verify_export(tmp_path / "model", copy, state, dtype=torch.float32)
    for folder, expected in names.items():
        assert load_file(tmp_path / "model" / folder / "model.safetensors").keys() == expected
    assert np.array_equal(drawn(tmp_path / "model"), drawn(base))


@pytest.mark.parametrize("base", WITH_CLIP, indirect=True)
def test_pooled_text_is_that_of_the_end_and_no_identifier_is_an_added_token(base: Path, copy: Path) -> None:
    """CLIP takes the pooled text at the highest id, which an added token would have."""
    family = family_of(base)
    tokens = family.tokenize(base, ["a photo of sks dog"])
    for part in of_clip(base):
        ids = tokens[f"{part.folder}.input_ids"][0]
        assert int(ids.argmax()) == ids.tolist().index(family.tokenizer(base).eos_token_id)
    for folder in {part.folder.replace("text_encoder", "tokenizer") for part in of_clip(copy)}:
        tokenizer = family.tokenizer(copy, folder)
        assert tokenizer.add_tokens(["qzx"]) == 1
        tokenizer.save_pretrained(copy / folder)
    added = family_of(copy).tokenizer(copy)
    assert "qzx" in added.get_vocab()
    assert "qzx" not in {candidate.text for candidate in candidates(added, limit=500)}


@pytest.mark.parametrize("base", WITH_T5, indirect=True)
def test_t5_keeps_in_fp32_what_overflows_in_fp16(base: Path) -> None:
    pipeline = load_pipeline(base, dtype=torch.float16)
    [part] = [part for part in family_of(base).text_encoders(base) if part.kind == "T5EncoderModel"]
    parameters = dict(getattr(pipeline, part.folder).named_parameters())
    kept = {name for name, parameter in parameters.items() if parameter.dtype is torch.float32}
    assert kept == {name for name in parameters if name.endswith(".wo.weight")}


@pytest.mark.parametrize("base", ALL, indirect=True)
def test_weights_of_half_precision_are_trained_in_fp32_and_tokenizers_published_as_they_are(
    base: Path, copy: Path, config: Any, tmp_path: Path
) -> None:
    """Without being told, transformers takes the dtype of the file, and save_pretrained drops vocabularies."""
    for path in copy.rglob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    model = load_model(copy, config("train.text_encoders=all"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    state = model.exported({name: each.detach() for name, each in model.named_parameters()})
    export_pipeline(copy, state, tmp_path / "model")
    for part in family_of(base).role("tokenizer"):
        files = [path for path in (base / part.folder).rglob("*") if path.is_file()]
        assert files
        for path in files:
            assert (tmp_path / "model" / path.relative_to(base)).read_bytes() == path.read_bytes()
    assert plain_pipeline(tmp_path / "model").components
