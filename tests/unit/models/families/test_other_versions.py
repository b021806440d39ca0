"""Repositories that other versions of diffusers and transformers wrote: the same pictures, or a sentence.

Fields and classes were renamed between them; a library passes over a name that it doesn't know, in silence.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext as none
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replicas.plain import plain_pipeline
from safetensors.torch import load_file, save_file

from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.export import export_pipeline, verify_export
from dreambooth.models.families import family_of
from dreambooth.sampling.sampler import load_pipeline, sample
from dreambooth.training.model import load_model

SIDE = 64
PROMPT = "a photo of sks dog"
ALL = [
    "stable-diffusion-1.5",
    "stable-diffusion-xl",
    "stable-diffusion-3.5",
    "flux-dev",
    "pixart-sigma",
    "deepfloyd-if",
]
WITH_T5 = ALL[2:]


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """A copy of a replica, to be changed."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


def change(path: Path, /, *left_out: str, **settings: Any) -> None:
    content = {name: value for name, value in json.loads(path.read_text()).items() if name not in left_out}
    path.write_text(json.dumps(content | settings))


def drawn(directory: Path) -> Any:
    """A picture (H, W, 3)."""
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": SIDE, "width": SIDE}
    picture = sample(load_pipeline(directory), [PROMPT], [5], dtype=torch.float32, **settings)[0]
    return np.asarray(picture, dtype=int)


def dtype_as_torch_dtype(base: Path) -> None:
    """transformers 4 wrote `torch_dtype`, transformers 5 writes `dtype`."""
    for part in family_of(base).text_encoders(base):
        change(base / part.folder / "config.json", "dtype", torch_dtype="float16", transformers_version="4.19.2")


def dtype_as_dtype(base: Path) -> None:
    for part in family_of(base).text_encoders(base):
        change(base / part.folder / "config.json", "torch_dtype", dtype="float16", transformers_version="5.0.0")


def tokenizers_of_the_other_class(base: Path) -> None:
    """Slow and fast tokenizers were classes of their own."""
    for part in family_of(base).role("tokenizer"):
        kind = part.kind.removesuffix("Fast") if part.kind.endswith("Fast") else f"{part.kind}Fast"
        change(base / part.folder / "tokenizer_config.json", tokenizer_class=kind)
        change(base / "model_index.json", **{part.folder: ["transformers", kind]})


def special_tokens_as_extra(base: Path) -> None:
    """`additional_special_tokens` became `extra_special_tokens`."""
    for part in family_of(base).role("tokenizer"):
        if not part.kind.startswith("T5"):
            continue
        path = base / part.folder / "tokenizer_config.json"
        tokens = json.loads(path.read_text())["additional_special_tokens"]
        change(path, "additional_special_tokens", extra_special_tokens=tokens)
        (base / part.folder / "special_tokens_map.json").unlink()


def a_feature_extractor(base: Path) -> None:
    """CLIPFeatureExtractor became CLIPImageProcessor; it comes with a safety checker, and is not read.

    Nor is an image encoder, which the index names though it wasn't downloaded.
    """
    (base / "feature_extractor").mkdir()
    content = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224}
    (base / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(content))
    named = {"feature_extractor": "CLIPFeatureExtractor", "image_encoder": "CLIPVisionModelWithProjection"}
    change(base / "model_index.json", **{name: ["transformers", kind] for name, kind in named.items()})


def a_vae_of_2022(base: Path) -> None:
    """Its attention had other names: query, key, value and proj_attn."""
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        return
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for name in [name for name in weights if ".attentions.0." in name]:
        old = name
        for new, former in renamed.items():
            old = old.replace(f".{new}.", f".{former}.")
        weights[old] = weights.pop(name)
    assert any(".attentions.0.proj_attn.weight" in name for name in weights)
    save_file(weights, path, {"format": "pt"})


def a_transformer_of_2024(base: Path) -> None:
    """PixArt's was a Transformer2DModel, with fields of other models beside its own."""
    if family_of(base).denoiser.kind != "PixArtTransformer2DModel":
        return
    others = {"norm_type": "ada_norm_single", "num_vector_embeds": None, "only_cross_attention": False}
    change(base / "transformer" / "config.json", _class_name="Transformer2DModel", **others)
    change(base / "model_index.json", transformer=["diffusers", "Transformer2DModel"])


def noise_by_its_former_field(base: Path) -> None:
    """`predict_epsilon` became `prediction_type`."""
    if family_of(base).noise == "diffusion":
        change(base / "scheduler" / "scheduler_config.json", "prediction_type", predict_epsilon=True)


EARLIER = (dtype_as_torch_dtype, noise_by_its_former_field, a_vae_of_2022, a_feature_extractor, a_transformer_of_2024)
LATER = (dtype_as_dtype, tokenizers_of_the_other_class, special_tokens_as_extra)


@pytest.mark.parametrize("base", ALL, indirect=True)
@pytest.mark.parametrize("written", [EARLIER, LATER], ids=["earlier", "later"])
def test_it_is_read_trained_and_published_as_the_usual_one(
    base: Path, copy: Path, written: tuple[Callable[[Path], None], ...], config: Any, tmp_path: Path
) -> None:
    for write in written:
        write(copy)
    found, usual = resolve_base_model(str(copy)), resolve_base_model(str(base))
    assert found.resolution == usual.resolution
    assert found.parameter_counts == usual.parameter_counts
    tokens, expected = (family_of(folder).tokenize(folder, [PROMPT, "a cat"]) for folder in (copy, base))
    assert [name for name in expected if not torch.equal(tokens[name], expected[name])] == []
    picture = drawn(base)
    assert np.array_equal(drawn(copy), picture)
    model = load_model(copy, config("train.text_encoders=all"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    state = model.exported({name: each.detach() for name, each in model.named_parameters()})
    export_pipeline(copy, state, tmp_path / "model")
    verify_export(tmp_path / "model", copy, state, dtype=torch.float32)
    assert abs(drawn(tmp_path / "model") - picture).max() <= 1  # in one file instead of several
    assert plain_pipeline(tmp_path / "model").components


def of_quantized_weights(base: Path) -> None:
    folder = family_of(base).denoiser.folder
    change(base / folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def of_heads_by_their_proper_name(base: Path) -> None:
    change(base / "unet" / "config.json", num_attention_heads=8)


def of_samples(base: Path) -> None:
    change(base / "scheduler" / "scheduler_config.json", "prediction_type", predict_epsilon=False)


REFUSED: list[tuple[str, Callable[[Path], None], str]] = [
    ("flux-dev", of_quantized_weights, r"transformer/config\.json: .*quantized .*bitsandbytes.*; give the model"),
    ("stable-diffusion-1.5", of_heads_by_their_proper_name, r"num_attention_heads is 8; .*attention_head_dim"),
    ("stable-diffusion-xl", of_heads_by_their_proper_name, r"num_attention_heads is 8; .*attention_head_dim"),
    ("deepfloyd-if", of_heads_by_their_proper_name, r"num_attention_heads is 8; .*attention_head_dim"),
    (
        "stable-diffusion-1.5",
        of_samples,
        'predict_epsilon is false.* write prediction_type "sample"',
    ),
]


@pytest.mark.parametrize(("base", "written", "sentence"), REFUSED, indirect=["base"])
def test_a_repository_that_would_be_read_wrong_is_refused(
    base: Path, copy: Path, written: Callable[[Path], None], sentence: str
) -> None:
    written(copy)
    with pytest.raises(InputError, match=sentence):
        resolve_base_model(str(copy))


@pytest.mark.parametrize("base", ["stable-diffusion-1.5"], indirect=True)
@pytest.mark.parametrize(
    ("version", "size", "side"), [("0.6.0", 32, 512), ("0.8.1", 96, 768), ("0.9.0", 32, 256), ("0.10.0.dev0", 8, 64)]
)
def test_a_size_that_early_diffusers_wrote_by_mistake_is_read_as_its_pipeline_reads_it(
    copy: Path, version: str, size: int, side: int
) -> None:
    change(copy / "unet" / "config.json", sample_size=size, _diffusers_version=version)
    assert resolve_base_model(str(copy)).resolution == side
    with pytest.warns(FutureWarning, match="sample_size") if version == "0.6.0" else none():
        pipeline = plain_pipeline(copy)
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == side
