"""Fine-tuned weights in a diffusers directory: whole, under the right names, and proven to be there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from dreambooth.config.settings import load_config
from dreambooth.models.export import export_pipeline, verify_export
from dreambooth.sampling.sampler import load_pipeline, load_trained, sample
from dreambooth.training.model import load_model

UNET, TEXT_ENCODER = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


def trained(base: Path, *, text_encoder: bool = True) -> dict[str, Tensor]:
    """A state_dict as an engine gives it, every value of it moved."""
    subject = {"name": "rex", "class_noun": "dog", "instance_images": "photos"}
    config = load_config(
        {"base_model": str(base), "subject": subject, "train": {"train_text_encoder": text_encoder}},
    )
    rng = torch.Generator().manual_seed(0)
    return {
        name: parameter.detach() + 0.1 + torch.rand(parameter.shape, generator=rng)
        for name, parameter in load_model(base, config).named_parameters()
    }


@pytest.fixture(scope="module")
def state(tiny_pipeline: Path) -> dict[str, Tensor]:
    return trained(tiny_pipeline)


def part(state: dict[str, Tensor], owner: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{owner}."): tensor for name, tensor in state.items() if name.startswith(f"{owner}.")}


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_a_pipeline_with_the_trained_weights(
        self, tiny_pipeline: Path, state: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype
    ) -> None:
        export_pipeline(tiny_pipeline, state, tmp_path / "model", dtype=dtype)
        verify_export(tmp_path / "model", tiny_pipeline, state, dtype=dtype)
        pipeline = StableDiffusionPipeline.from_pretrained(
            tmp_path / "model", dtype=dtype, local_files_only=True, safety_checker=None
        )
        for owner, component in (("denoiser", pipeline.unet), ("text_encoder", pipeline.text_encoder)):
            loaded, expected = dict(component.named_parameters()), part(state, owner)
            assert loaded.keys() == expected.keys()
            assert [name for name in loaded if not torch.equal(loaded[name], expected[name].to(dtype))] == []

    def test_all_else_is_the_bases(self, tiny_pipeline: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
        export_pipeline(tiny_pipeline, state, tmp_path / "model", dtype=torch.float16)
        assert files(tmp_path / "model") == files(tiny_pipeline)
        for name in files(tiny_pipeline) - {UNET, TEXT_ENCODER}:
            assert (tmp_path / "model" / name).read_bytes() == (tiny_pipeline / name).read_bytes(), name

    @pytest.mark.parametrize("resolution", [64, 32, 96])
    @pytest.mark.parametrize("sample_size", [16, [16, 16], None], ids=str)
    def test_it_is_sampled_at_what_it_was_trained_at(
        self, tiny_pipeline: Path, state: dict[str, Tensor], tmp_path: Path, resolution: int, sample_size: Any
    ) -> None:
        base = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
        config = base / "unet" / "config.json"
        settings = json.loads(config.read_text()) | {"sample_size": sample_size, "_diffusers_version": "0.6.0"}
        config.write_text(json.dumps(settings))
        export_pipeline(base, state, tmp_path / "model", dtype=torch.float32, resolution=resolution)
        verify_export(tmp_path / "model", base, state, dtype=torch.float32)
        pipeline = load_pipeline(tmp_path / "model", device="cpu", dtype=torch.float32)
        [image] = sample(pipeline, ["a dog"], [0], num_inference_steps=1, guidance_scale=1.0)
        assert image.size == (resolution, resolution)

    def test_a_frozen_text_encoder_is_the_bases(self, tiny_pipeline: Path, tmp_path: Path) -> None:
        state = trained(tiny_pipeline, text_encoder=False)
        export_pipeline(tiny_pipeline, state, tmp_path / "model", dtype=torch.float16)
        verify_export(tmp_path / "model", tiny_pipeline, state, dtype=torch.float16)
        assert (tmp_path / "model" / TEXT_ENCODER).read_bytes() == (tiny_pipeline / TEXT_ENCODER).read_bytes()

    def test_a_base_in_several_files_becomes_one(
        self, tiny_pipeline: Path, state: dict[str, Tensor], tmp_path: Path
    ) -> None:
        base = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
        unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", local_files_only=True)
        (base / UNET).unlink()
        unet.save_pretrained(base / "unet", max_shard_size="100KB")
        assert len(list((base / "unet").glob("*.safetensors"))) > 1
        (base / "unet" / "diffusion_pytorch_model.fp16.bin").write_bytes(b"other weights")
        export_pipeline(base, state, tmp_path / "model", dtype=torch.float32)
        verify_export(tmp_path / "model", base, state, dtype=torch.float32)
        assert files(tmp_path / "model") == files(tiny_pipeline)
        loaded = UNet2DConditionModel.from_pretrained(tmp_path / "model", subfolder="unet", local_files_only=True)
        assert torch.equal(loaded.conv_in.weight, state["denoiser.conv_in.weight"])

    def test_sampling_from_memory_uses_the_same_weights(self, tiny_pipeline: Path, state: dict[str, Tensor]) -> None:
        pipeline = load_trained(tiny_pipeline, state, device="cpu", dtype=torch.float32)
        assert torch.equal(pipeline.unet.conv_in.weight, state["denoiser.conv_in.weight"])
        name = "final_layer_norm.weight"
        assert torch.equal(pipeline.text_encoder.state_dict()[name], state[f"text_encoder.{name}"])


class TestVerify:
    @pytest.fixture
    def model(self, tiny_pipeline: Path, state: dict[str, Tensor], tmp_path: Path) -> Path:
        export_pipeline(tiny_pipeline, state, tmp_path / "model", dtype=torch.float16)
        return tmp_path / "model"

    @pytest.mark.parametrize(
        ("file", "name"), [(UNET, "conv_out.bias"), (TEXT_ENCODER, "embeddings.token_embedding.weight")]
    )
    def test_a_changed_tensor_is_named(
        self, model: Path, tiny_pipeline: Path, state: dict[str, Tensor], file: str, name: str
    ) -> None:
        stored = load_file(model / file)
        stored[name].view(-1)[-1] *= 1.001  # the smallest change that fp16 knows
        save_file(stored, model / file)
        with pytest.raises(ValueError, match=rf"{name} in .* is not what was trained"):
            verify_export(model, tiny_pipeline, state, dtype=torch.float16)

    def test_a_missing_tensor_is_named(self, model: Path, tiny_pipeline: Path, state: dict[str, Tensor]) -> None:
        stored = load_file(model / UNET)
        del stored["conv_in.bias"]
        save_file(stored, model / UNET)
        with pytest.raises(ValueError, match=r"lacks conv_in\.bias, which was trained"):
            verify_export(model, tiny_pipeline, state, dtype=torch.float16)

    def test_the_base_itself_does_not_pass(self, tiny_pipeline: Path, state: dict[str, Tensor]) -> None:
        with pytest.raises(ValueError, match="is not what was trained"):
            verify_export(tiny_pipeline, tiny_pipeline, state, dtype=torch.float32)

    def test_another_dtype_does_not_pass(self, model: Path, tiny_pipeline: Path, state: dict[str, Tensor]) -> None:
        with pytest.raises(ValueError, match="is not what was trained"):
            verify_export(model, tiny_pipeline, state, dtype=torch.float32)


class TestNames:
    @pytest.fixture
    def old_base(self, tiny_pipeline: Path, tmp_path: Path) -> Path:
        """As Stable Diffusion's files have it: names with a prefix, and a buffer that is no parameter."""
        base = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
        stored: dict[str, Any] = {f"text_model.{name}": t for name, t in load_file(base / TEXT_ENCODER).items()}
        stored["text_model.embeddings.position_ids"] = torch.arange(24)[None]
        save_file(stored, base / TEXT_ENCODER, {"format": "pt"})
        return base

    def test_old_ones_are_kept(self, old_base: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
        assert trained(old_base).keys() == state.keys()
        export_pipeline(old_base, state, tmp_path / "model", dtype=torch.float16)
        verify_export(tmp_path / "model", old_base, state, dtype=torch.float16)
        stored = load_file(tmp_path / "model" / TEXT_ENCODER)
        assert {*stored} == {f"text_model.{name}" for name in part(state, "text_encoder")}

    def test_and_can_be_read_again(self, old_base: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
        export_pipeline(old_base, state, tmp_path / "model", dtype=torch.float32)
        again = CLIPTextModel.from_pretrained(tmp_path / "model", subfolder="text_encoder", local_files_only=True)
        loaded = dict(again.named_parameters())
        expected = part(state, "text_encoder")
        assert [name for name in expected if not torch.equal(loaded[name], expected[name])] == []

    @pytest.mark.parametrize("change", ["one less", "one more"])
    def test_others_than_the_bases_are_refused(
        self, tiny_pipeline: Path, state: dict[str, Tensor], tmp_path: Path, change: str
    ) -> None:
        differing = dict(state)
        if change == "one less":
            del differing["denoiser.conv_in.bias"]
        else:
            differing["denoiser.conv_in.scale"] = torch.ones(1)
        with pytest.raises(ValueError, match=r"differ in 1 name, first conv_in\.(bias|scale)"):
            export_pipeline(tiny_pipeline, differing, tmp_path / "model", dtype=torch.float16)
        assert not (tmp_path / "model").exists()
