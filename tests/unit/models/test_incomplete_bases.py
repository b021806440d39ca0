"""Copies of base models that are damaged or lack a part."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from base_folders import UNET, change, fault

from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.export import export_pipeline
from dreambooth.models.families import load_tokenizer
from dreambooth.training.model import load_components


class TestIncompleteCopies:
    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
    def test_a_missing_part(self, base: Path, part: str) -> None:
        shutil.rmtree(base / part)
        assert f"lacks {part}; is the copy complete?" in fault(base)

    @pytest.mark.parametrize(
        "name",
        [
            "unet/config.json",
            "vae/config.json",
            "text_encoder/config.json",
            "scheduler/scheduler_config.json",
            "tokenizer/tokenizer_config.json",
            "tokenizer/tokenizer.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
        ],
    )
    def test_a_missing_file(self, base: Path, name: str) -> None:
        (base / name).unlink()
        assert f"{base / name}" in fault(base)
        assert "is the copy complete?" in fault(base)

    @pytest.mark.parametrize(
        "name", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"]
    )
    @pytest.mark.parametrize("content", ["", "{", "[1]"])
    def test_damaged_settings(self, base: Path, name: str, content: str) -> None:
        (base / name).write_text(content)
        assert f"{base / name} is damaged" in fault(base)

    @pytest.mark.parametrize("size", [0, 5000, -100])
    def test_weights_that_end_too_early(self, base: Path, size: int) -> None:
        (base / UNET).write_bytes((base / UNET).read_bytes()[:size])
        assert f"{base / UNET} is damaged" in fault(base)

    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("diffusion_pytorch_model.bin", "use_safetensors=False).save_pretrained"),
            ("diffusion_pytorch_model.ckpt", "could run anything"),
            ("diffusion_pytorch_model.bf16-00001-of-00002.safetensors", "is the copy complete?"),
            ("diffusion_pytorch_model.fp16.bin", "use_safetensors=False).save_pretrained"),
            ("something.else", ".save_pretrained"),
        ],
    )
    def test_weights_of_another_kind_alone(self, base: Path, name: str, told: str) -> None:
        (base / UNET).rename(base / "unet" / name)
        cause = "there is" if "variant" in told else "is the copy complete?"
        assert f"there is no {base / UNET}; {cause}" in fault(base)
        assert told in fault(base)

    @pytest.mark.parametrize(
        "content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": "../b"}}']
    )
    def test_an_index_that_names_no_weights(self, base: Path, content: str) -> None:
        (base / UNET).rename(base / "unet" / "diffusion_pytorch_model-00001-of-00001.safetensors")
        index = base / f"{UNET}.index.json"
        index.write_text(content)
        assert f"{index} is damaged" in fault(base)

    @pytest.mark.parametrize(
        ("name", "damage"),
        [
            ("tokenizer/tokenizer.json", lambda content: '{"model": 1}'),
            (
                "tokenizer/tokenizer_config.json",
                lambda content: content.replace('"pad_token": "', '"pad_token": null, "x": "'),
            ),
        ],
    )
    def test_a_tokenizer_that_is_none(self, base: Path, name: str, damage: Callable[[str], str]) -> None:
        path = base / name
        path.write_text(damage(path.read_text()))
        with pytest.raises(InputError, match=f"the tokenizer in {base / 'tokenizer'}"):
            load_tokenizer(resolve_base_model(str(base)).directory)

    def test_a_tokenizer_whose_files_change_is_read_again(self, base: Path) -> None:
        assert load_tokenizer(base) is load_tokenizer(base)
        assert load_tokenizer(base).model_max_length == 24
        change(base / "tokenizer" / "tokenizer_config.json", model_max_length=12)
        assert load_tokenizer(base).model_max_length == 12

    def test_one_of_several_files_of_weights(self, base: Path) -> None:
        from diffusers import UNet2DConditionModel

        whole = resolve_base_model(str(base)).parameter_counts
        unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", local_files_only=True)
        (base / UNET).unlink()
        unet.save_pretrained(base / "unet", max_shard_size="100KB")
        assert resolve_base_model(str(base)).parameter_counts == whole
        shard = sorted((base / "unet").glob("*.safetensors"))[1]
        shard.unlink()
        assert fault(base) == f"there is no {shard}; is the copy complete?"

    @pytest.mark.parametrize("variant", ["fp16", "bf16"])
    @pytest.mark.parametrize("shards", [False, True])
    def test_half_precision_weights_alone(self, base: Path, tmp_path: Path, variant: str, shards: bool) -> None:
        """As many repositories are downloaded; their models are published under the plain names."""
        import diffusers

        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant]
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base, dtype=dtype, local_files_only=True)
        half = tmp_path / "half"
        pipeline.save_pretrained(half, variant=variant, max_shard_size="30KB" if shards else "1GB")
        found = resolve_base_model(str(half))
        assert found.parameter_counts == resolve_base_model(str(base)).parameter_counts
        assert load_components(half).denoiser.dtype is torch.float32
        export_pipeline(half, {}, tmp_path / "model")
        again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
        for name, weight in pipeline.unet.state_dict().items():
            assert torch.equal(again.unet.state_dict()[name], weight.float())

    def test_variants_are_not_counted_twice(self, base: Path) -> None:
        counts = resolve_base_model(str(base)).parameter_counts
        shutil.copy(base / UNET, base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
        assert resolve_base_model(str(base)).parameter_counts == counts
