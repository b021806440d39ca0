"""One file as other programs read it: diffusers gives every tensor and picture back; names are the published ones."""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from replicas import REPLICAS, built
from replicas.plain import plain_pipeline
from safetensors import safe_open
from safetensors.torch import load_file

from dreambooth.config.settings import load_config
from dreambooth.data.images import find_instance_images
from dreambooth.data.prepare import prepare_data
from dreambooth.errors import InputError
from dreambooth.models.export import export_pipeline
from dreambooth.models.families import family_named, family_of
from dreambooth.models.families import original_names as original
from dreambooth.models.placed import Placed
from dreambooth.models.single_file import write_single_file
from dreambooth.training.engine import TorchEngine
from dreambooth.training.loop import fit
from dreambooth.training.model import load_model

READABLE = [
    "stable-diffusion-1.5",
    "stable-diffusion-2.1-v",
    "stable-diffusion-xl",
    "stable-diffusion-3.5",
    "stable-diffusion-3-without-t5",
    "flux-dev",
    "flux-schnell",
]


@pytest.fixture(scope="module", params=READABLE)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A replica; of Stable Diffusion 3 one that was fine-tuned, text encoders too."""
    temporary = tmp_path_factory.mktemp(request.param)
    folder = built(request.param, temporary / "base", seed=1)
    return fine_tuned(folder, temporary) if "diffusion-3" in request.param else folder


def fine_tuned(base: Path, temporary: Path) -> Path:
    """A model of two steps from a base."""
    picture = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    picture.save(temporary / "photograph.png")
    subject = {"name": "rex", "class_noun": "dog", "identifier": "sks", "instance_images": str(temporary / "*.png")}
    settings = load_config(
        {
            "base_model": str(base),
            "subject": subject,
            "images": {"resolution": 64},
            "train": {"max_train_steps": 2, "learning_rate": 1e-3},
        }
    )
    engine = TorchEngine(load_model(base, settings), settings.train)
    images = find_instance_images(settings.subject.instance_images)
    fit(engine, prepare_data(base, settings, images, [picture]), settings.train)
    export_pipeline(base, engine.state_dict(), temporary / "model")
    before, after = (load_file(folder / "text_encoder" / "model.safetensors") for folder in (base, temporary / "model"))
    kept = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert kept == {"text_projection.weight"}  # the identity, for which the file has no place
    return temporary / "model"


@functools.cache
def reader_of_any_width() -> Callable[..., Any]:
    """diffusers' reader of FLUX.1 knows no other width than 3072; the replica's is 32."""
    from diffusers.loaders import single_file_utils

    name = "convert_flux_transformer_checkpoint_to_diffusers"
    source = inspect.getsource(getattr(single_file_utils, name))
    assert "inner_dim = 3072" in source
    names = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", "inner_dim = 32"), names)
    read: Callable[..., Any] = names[name]
    return read


@pytest.fixture
def any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.loaders import single_file_model

    kinds = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    reader = kinds["FluxTransformer2DModel"] | {"checkpoint_mapping_fn": reader_of_any_width()}
    monkeypatch.setitem(kinds, "FluxTransformer2DModel", reader)


def read_back(path: Path, directory: Path) -> Any:
    import diffusers

    family = family_of(directory)
    there = {part.folder for part in family.parts(directory)}
    left_out = {part.folder: None for part in family.components if part.folder not in there}
    index = json.loads((directory / "model_index.json").read_text())
    left_out |= dict.fromkeys({"safety_checker", "feature_extractor"} & index.keys())
    return getattr(diffusers, family.pipeline_class).from_single_file(
        str(path), config=str(directory), local_files_only=True, torch_dtype=torch.float32, **left_out
    )


class TestDiffusersReader:
    @pytest.mark.usefixtures("any_width")
    def test_gives_back_every_tensor_and_the_same_picture(self, directory: Path, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        digest = write_single_file(directory, path, metadata={"identifier": "sks"})
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
        theirs, ours = read_back(path, directory), plain_pipeline(directory)
        compared = 0
        for part in family_of(directory).parts(directory):
            if part.weights is None:
                continue
            expected = getattr(ours, part.folder).state_dict()
            found = getattr(theirs, part.folder).eval().state_dict()  # T5 comes with its dropout on
            assert set(found) == set(expected)
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), f"{part.folder}.{name}"
                compared += 1
        assert compared > 200
        theirs.scheduler = ours.scheduler
        pictures = [
            np.asarray(
                pipeline(
                    "a photo of sks dog",
                    num_inference_steps=2,
                    height=64,
                    width=64,
                    output_type="np",
                    generator=torch.Generator().manual_seed(0),
                ).images
            )
            for pipeline in (ours, theirs)
        ]
        assert np.array_equal(*pictures)

    def test_a_file_in_half_precision_has_the_rounded_tensors(self, directory: Path, tmp_path: Path) -> None:
        whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
        write_single_file(directory, whole, metadata={})
        write_single_file(directory, half, dtype=torch.bfloat16, metadata={})
        expected, found = load_file(whole), load_file(half)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in expected.items())

    def test_no_more_than_one_tensor_is_made_at_a_time(self, directory: Path, tmp_path: Path) -> None:
        sizes: list[tuple[int, int]] = []
        path = tmp_path / "model.safetensors"
        write_single_file(directory, path, metadata={}, on_progress=lambda done, total: sizes.append((done, total)))
        with safe_open(path, framework="pt") as stored:
            assert len(sizes) == len(list(stored.keys()))
        assert sizes[-1][0] == sizes[-1][1]
        assert [done for done, _ in sizes] == sorted(done for done, _ in sizes)


@pytest.mark.parametrize("name", ["deepfloyd-if", "pixart-sigma"])
def test_a_family_without_such_a_layout_is_refused(name: str, tmp_path: Path) -> None:
    REPLICAS[name](tmp_path)
    with pytest.raises(InputError, match="has no layout of one file that other programs read"):
        write_single_file(tmp_path, tmp_path / "model.safetensors", metadata={})
    assert not (tmp_path / "model.safetensors").exists()


def clip(layers: int, kind: str) -> list[str]:
    """Names of a CLIP of so many layers."""
    import transformers

    config = transformers.CLIPTextConfig(hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, vocab_size=8)
    return list(getattr(transformers, kind)(config).state_dict())


def unet(**settings: Any) -> list[str]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return list(UNet2DConditionModel(**settings).state_dict())


def vae(**settings: Any) -> list[str]:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        settings |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        return list(AutoencoderKL(block_out_channels=(32, 64, 96, 96), layers_per_block=2, **settings).state_dict())


def transformer(kind: str, **settings: Any) -> list[str]:
    import diffusers

    with torch.device("meta"):
        return list(getattr(diffusers, kind)(**settings).state_dict())


def placed_by(pipeline_class: str, folder: str, names: list[str]) -> dict[str, Placed]:
    """Where the family of a pipeline has a component's tensors."""
    family = family_named(pipeline_class)
    assert family is not None
    return dict(family.single_file_names(Path(), folder, names))


def read_layers(names: dict[str, Placed]) -> dict[str, Placed]:
    """Of SDXL's first CLIP what is read: neither the last layer nor the norm behind it."""
    unread = ("layers.11.", "final_layer_norm.")
    return {name: placed for name, placed in names.items() if not any(part in name for part in unread)}


def bare(names: dict[str, Placed], prefix: str) -> dict[str, Placed]:
    """Names as in a file of this component alone."""
    assert all(placed.name.startswith(prefix) for placed in names.values())
    return {name: Placed(name=placed.name.removeprefix(prefix)) for name, placed in names.items()}


SD3 = {"num_layers": 24, "attention_head_dim": 4, "num_attention_heads": 2, "caption_projection_dim": 8}
SD3 |= {"joint_attention_dim": 8, "pooled_projection_dim": 8, "sample_size": 8, "pos_embed_max_size": 8}
FLUX = {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 8, "num_attention_heads": 1}
FLUX |= {"joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4)}
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PUBLISHED: dict[str, tuple[int, str, Callable[[], dict[str, Placed]]]] = {
    "sd 1.5, unet": (
        686,
        "fc4ba3c6e225ef52bb9b5b3768d1520aa018585dbfd8e9ae3a7df8522434fc5c",
        lambda: original.unet_names(unet()),
    ),
    "sd 1.5, text encoder": (
        196,
        "c0e53332af358e1cbad8d63a686d2f6b2c25cf2023717519d010570fe8a521e6",
        lambda: original.clip_names(clip(12, "CLIPTextModel"), original.CLIP),
    ),
    "sd 1.5, vae": (
        248,
        "abb7d3ab1d04b058eb1029f13dc4ac213a8243719b249c2a651a84e23b94ceb5",
        lambda: original.vae_names(vae()),
    ),
    "sdxl, unet": (
        1680,
        "f96b1730730099f8030b3c3bfa6cd32e423a9b37d31409fa564d637790d5c350",
        lambda: original.unet_names(unet(**XL)),
    ),
    "sdxl, second text encoder": (
        389,
        "813677a1e6b19f086cd41fe5bbe47c0facce29cfa2ce000e30e44f3d6d999c37",
        lambda: original.open_clip_names(clip(32, "CLIPTextModelWithProjection"), original.OPEN_CLIP_XL),
    ),
    "sdxl, first text encoder": (
        178,
        "a66ddc8a4f75e5a6f45d7d29d466f898b9090a3a316d4f174b51b11580afb1c6",
        lambda: read_layers(placed_by("StableDiffusionXLPipeline", "text_encoder", clip(12, "CLIPTextModel"))),
    ),
    "sdxl, vae": (
        248,
        "abb7d3ab1d04b058eb1029f13dc4ac213a8243719b249c2a651a84e23b94ceb5",
        lambda: placed_by("StableDiffusionXLPipeline", "vae", vae()),
    ),
    "sd3, transformer": (
        491,
        "a0e47b55dc194a7213b223f528c8370e67fd8670799b0c31dc5c446499ab64e4",
        lambda: placed_by("StableDiffusion3Pipeline", "transformer", transformer("SD3Transformer2DModel", **SD3)),
    ),
    "flux.1-dev, transformer": (
        780,
        "40c5bb5542c8c5b436cf65ec51ec7929548a50b64a1e22b8aeaf7340cd337888",
        lambda: placed_by(
            "FluxPipeline", "transformer", transformer("FluxTransformer2DModel", guidance_embeds=True, **FLUX)
        ),
    ),
    "flux.1, vae": (
        244,
        "a487dc73eaeaf30ffc47138a92713cde0a91a706c0da104d85a192aabad96d0a",
        lambda: bare(placed_by("FluxPipeline", "vae", vae(use_quant_conv=False, use_post_quant_conv=False)), "vae."),
    ),
    "sd3, first text encoder": (
        196,
        "3eee21e80a3f3deccd5fc96faedcaa54bf41c81c23dfbb1cd3b35b0209e7c7b9",
        lambda: original.clip_names(clip(12, "CLIPTextModel"), original.CLIP_L),
    ),
    "sd3, second text encoder": (
        517,
        "078a8b878f48c80608fd80b1a93493d4b255c38e5008f09edcda684955aaee86",
        lambda: original.clip_names(clip(32, "CLIPTextModelWithProjection"), original.CLIP_G),
    ),
}
"""Number of names and sha256 over the sorted names, a line each, of the published checkpoints' parts.

By the tables of names in modelscope/DiffSynth-Studio: at commits e3f8a57, 6f79fd6, 0699212 sd_unet.py, sdxl_unet.py,
sd_text_encoder.py, sd_vae_encoder.py, sd_vae_decoder.py, sdxl_text_encoder.py and sd3_text_encoder.py; at 9920b8d
sd3_dit.py; at afd101f flux_dit.py, flux_vae.py, and sdxl_vae_decoder.py, by which SDXL's VAE has the names of SD's. Of
SDXL's first CLIP they name the layers that are read.
"""


@pytest.mark.parametrize("part", PUBLISHED)
def test_names_are_those_of_the_published_checkpoint(part: str) -> None:
    count, digest, names = PUBLISHED[part]
    found = sorted({placed.name for placed in names().values()})
    assert len(found) == count
    assert hashlib.sha256("".join(f"{name}\n" for name in found).encode()).hexdigest() == digest
