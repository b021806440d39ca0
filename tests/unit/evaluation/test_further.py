"""DINOv2 and DreamSim beside a bank, with random weights under the published names."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_replicas import BRANCHES, DEPTH, OUTPUT, PATCH, SIDE, WIDTH, save_dinov2, save_dreamsim
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Model, ViTConfig, ViTModel

from dreambooth.errors import InputError
from dreambooth.evaluation.dreamsim import DreamSim
from dreambooth.evaluation.further import load_further
from dreambooth.evaluation.patches import MaskedPhotograph
from dreambooth.miniature import CLIP_DIR, VIT_DIR, subject_dir

SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": WIDTH // 64,
    "intermediate_size": 4 * WIDTH,
    "image_size": SIDE,
    "patch_size": PATCH,
}
MEANS = {"dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
CLIP_MEANS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def photographs() -> list[Image.Image]:
    opened = [
        Image.open(path).convert("RGB") for name in ("mint-dog", "lime-car") for path in subject_dir(name).glob("*.png")
    ]
    return [image.resize((50, 40)) for image in opened]


def pixels(images: list[Image.Image], means: tuple[tuple[float, ...], tuple[float, ...]]) -> torch.Tensor:
    """Squeezed to a square."""
    squeezed = np.stack([np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in images]) / 255
    return torch.from_numpy((squeezed - means[0]) / means[1]).float().permute(0, 3, 1, 2)


def split(weights: dict[str, torch.Tensor], block: int) -> dict[str, torch.Tensor]:
    """A block's `qkv` as q, k and v."""
    return {
        f"{letter}_proj.{part}": each
        for part in ("weight", "bias")
        for letter, each in zip("qkv", weights[f"blocks.{block}.attn.qkv.{part}"].chunk(3), strict=True)
    }


def parts(weights: dict[str, torch.Tensor], source: str, target: str) -> dict[str, torch.Tensor]:
    return {f"{target}.{part}": weights[f"{source}.{part}"] for part in ("weight", "bias")}


def by_dino(weights: dict[str, torch.Tensor], images: list[Image.Image]) -> torch.Tensor:
    model = ViTModel(ViTConfig(**SIZES, layer_norm_eps=1e-6), add_pooling_layer=False).eval()
    named = {"embeddings.cls_token": weights["cls_token"], "embeddings.position_embeddings": weights["pos_embed"]}
    named |= parts(weights, "patch_embed.proj", "embeddings.patch_embeddings.projection")
    named |= parts(weights, "norm", "layernorm")
    for block in range(DEPTH):
        named |= {f"layers.{block}.attention.{name}": each for name, each in split(weights, block).items()}
        for own, theirs in (
            ("attn.proj", "attention.o_proj"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            named |= parts(weights, f"blocks.{block}.{own}", f"layers.{block}.{theirs}")
    model.load_state_dict(named)
    model.layernorm = nn.Identity()  # DreamSim takes the last block's output
    output: torch.Tensor = model(pixels(images, MEANS["dino"])).last_hidden_state[:, 0]
    return output


def by_clip(weights: dict[str, torch.Tensor], images: list[Image.Image], activation: str) -> torch.Tensor:
    config = CLIPVisionConfig(**SIZES, projection_dim=OUTPUT, hidden_act=activation)
    model = CLIPVisionModelWithProjection(config).eval()
    # CLIP's convolution has no bias: its part is the same at every place but the class token's.
    positions = weights["pos_embed"][0].clone()
    positions[1:] += weights["patch_embed.proj.bias"]
    named = {
        "vision_model.embeddings.class_embedding": weights["cls_token"][0, 0],
        "vision_model.embeddings.position_embedding.weight": positions,
        "vision_model.embeddings.patch_embedding.weight": weights["patch_embed.proj.weight"],
        "visual_projection.weight": weights["proj"].T,
    }
    named |= parts(weights, "pos_drop", "vision_model.pre_layrnorm")
    named |= parts(weights, "norm", "vision_model.post_layernorm")
    for block in range(DEPTH):
        layer = f"vision_model.encoder.layers.{block}"
        named |= {f"{layer}.self_attn.{name}": each for name, each in split(weights, block).items()}
        for own, theirs in (
            ("attn.proj", "self_attn.out_proj"),
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            named |= parts(weights, f"blocks.{block}.{own}", f"{layer}.{theirs}")
    model.load_state_dict(named)
    output: torch.Tensor = model(pixels(images, CLIP_MEANS)).image_embeds
    return output


class TestDreamSim:
    @pytest.mark.parametrize("branches", [BRANCHES, ("dino_vitb16",)])
    @torch.no_grad()
    def test_against_transformers(self, tmp_path: Path, branches: tuple[str, ...]) -> None:
        merged, images = save_dreamsim(tmp_path / "dreamsim", branches), photographs()
        outputs = {
            "dino_vitb16": lambda: by_dino(merged["dino_vitb16"], images),
            "clip_vitb16": lambda: by_clip(merged["clip_vitb16"], images, "quick_gelu"),
            "open_clip_vitb16": lambda: by_clip(merged["open_clip_vitb16"], images, "gelu"),
        }
        joined = torch.cat([outputs[branch]() for branch in branches], dim=1)
        centred = joined - joined.mean(dim=1, keepdim=True)
        expected = nn.functional.cosine_similarity(centred[:, None], centred[None], dim=2)
        found = DreamSim(tmp_path / "dreamsim", device="cpu").encode(images)
        torch.testing.assert_close(found @ found.T, expected, rtol=0, atol=2e-5)
        assert float((1 - expected).max()) > 0.01  # else any embedding would do

    def test_its_lora_and_every_file_are_in_its_hash(self, tmp_path: Path) -> None:
        first, second = tmp_path / "first", tmp_path / "second"
        save_dreamsim(first)
        shutil.copytree(first, second)
        (second / "pretrained.zip").write_bytes(b"what the package unpacked")
        assert load_further("dreamsim", str(first)).hash == load_further("dreamsim", f"file://{second}").hash
        config = second / "ensemble_lora" / "adapter_config.json"
        config.write_text(config.read_text().replace("0.5", "0.25"))
        tuned = [load_further("dreamsim", str(folder)) for folder in (first, second)]
        assert tuned[0].hash != tuned[1].hash
        images = photographs()[:2]
        assert not torch.allclose(tuned[0].encode(images), tuned[1].encode(images), atol=1e-4)
        assert tuned[0].subject_similarities(images, []) is None

    @pytest.mark.parametrize(
        ("spoil", "said"),
        [
            (shutil.rmtree, "there is no such folder"),
            (lambda folder: shutil.rmtree(folder / "ensemble_lora"), "got none of them"),
            (lambda folder: (folder / "dino_vitb16_single_lora").mkdir(), "leave one of them"),
            (lambda folder: shutil.rmtree(folder / "checkpoints"), "there is no dino_vitbase16_pretrain.pth or"),
            (lambda folder: cut(folder / "clip_vitb16_pretrain.pth.tar"), "is damaged or no file of weights"),
            (lambda folder: cut(folder / "ensemble_lora" / "adapter_model.safetensors"), "is damaged or no file of"),
            (lambda folder: (folder / "ensemble_lora" / "adapter_config.json").write_text("{}"), "is no LoRA's"),
            (
                lambda folder: torch.save({"x": torch.ones(1)}, folder / "clip_vitb16_pretrain.pth.tar"),
                "DreamSim's ViT",
            ),
            (lambda folder: torch.save([1], folder / "clip_vitb16_pretrain.pth.tar"), "holds list, not a state dict"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path: Path, spoil: Any, said: str) -> None:
        save_dreamsim(tmp_path / "dreamsim")
        spoil(tmp_path / "dreamsim")
        with pytest.raises(InputError, match=f"^evaluation.dreamsim: .*{said}"):
            load_further("dreamsim", str(tmp_path / "dreamsim"))

    def test_a_pickle_is_not_run(self, tmp_path: Path) -> None:
        save_dreamsim(tmp_path / "dreamsim")
        torch.save({"state_dict": {"x": Trap(tmp_path / "sprung")}}, tmp_path / "dreamsim/clip_vitb16_pretrain.pth.tar")
        with pytest.raises(InputError, match="is damaged or no file of weights"):
            load_further("dreamsim", str(tmp_path / "dreamsim"))
        assert not (tmp_path / "sprung").exists()


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class TestDINOv2:
    def test_the_class_token_of_the_middle(self, tmp_path: Path) -> None:
        save_dinov2(tmp_path / "dinov2")
        image = photographs()[0].resize((300, 200))
        middle = image.resize((384, 256), Image.Resampling.BICUBIC).crop((80, 16, 304, 240))
        values = (np.asarray(middle) / 255 - MEANS["dino"][0]) / MEANS["dino"][1]
        model = Dinov2Model.from_pretrained(tmp_path / "dinov2").eval()
        with torch.no_grad():
            token = model(torch.from_numpy(values).float().permute(2, 0, 1)[None]).last_hidden_state[:, 0]
        encoder = load_further("dinov2", str(tmp_path / "dinov2"))
        torch.testing.assert_close(encoder.encode([image]), nn.functional.normalize(token, dim=1), rtol=0, atol=1e-5)

    def test_it_has_patches(self, tmp_path: Path) -> None:
        save_dinov2(tmp_path / "dinov2")
        encoder, images = load_further("dinov2", str(tmp_path / "dinov2")), photographs()[:2]
        mask = Image.new("L", images[0].size, 255)
        similar = encoder.subject_similarities(images, [MaskedPhotograph(picture=images[0], mask=mask)])
        assert similar is not None
        assert similar.shape == (2, 1)
        assert float(similar[0, 0]) == pytest.approx(1, abs=1e-5)
        assert float(similar[1, 0]) < 0.999

    def test_other_weights_have_another_hash(self, tmp_path: Path) -> None:
        for seed in (0, 1):
            save_dinov2(tmp_path / str(seed), seed=seed)
        shutil.copytree(tmp_path / "0", tmp_path / "copy")
        hashes = [load_further("dinov2", str(tmp_path / name)).hash for name in ("0", "1", "copy")]
        assert hashes[0] != hashes[1]
        assert hashes[0] == hashes[2]

    @pytest.mark.parametrize(
        ("address", "said"),
        [
            ("/no/such/folder", "there is no such folder"),
            (str(VIT_DIR), "is of the type 'vit'; expected 'dinov2'"),
            (str(CLIP_DIR), "is of the type 'clip'; expected 'dinov2'"),
        ],
    )
    def test_another_model_is_refused(self, address: str, said: str) -> None:
        with pytest.raises(InputError, match=f"^evaluation.dinov2: .*{said}"):
            load_further("dinov2", address)

    def test_weights_that_are_cut_short_or_lack_some_are_refused(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        for name in ("cut", "lacking"):
            save_dinov2(tmp_path / name)
        cut(tmp_path / "cut" / "model.safetensors")
        with pytest.raises(InputError, match="are damaged or don't fit its config"):
            load_further("dinov2", str(tmp_path / "cut"))
        weights = load_file(tmp_path / "lacking" / "model.safetensors")
        del weights["encoder.layer.1.attention.attention.query.weight"]
        save_file(weights, tmp_path / "lacking" / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=r"lack .*q_proj.weight and 0 other tensors of a Dinov2Model"):
            load_further("dinov2", str(tmp_path / "lacking"))


def test_another_name_is_refused() -> None:
    with pytest.raises(InputError, match="there is no encoder 'dino3'; expected dinov2 or dreamsim"):
        load_further("dino3", "x")
