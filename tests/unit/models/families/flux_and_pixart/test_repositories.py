"""Which repositories of FLUX.1 and PixArt-Sigma are base models, and which files of them are read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_and_pixart_runs import plain_pipeline

from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model


def test_a_half_precision_variant_alone_in_shards_with_other_formats_beside(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "variant"
    plain_pipeline(base).to(torch.float16).save_pretrained(copy, variant="fp16", max_shard_size="100KB")
    for part in ("tokenizer", "tokenizer_2"):
        if (base / part).is_dir():
            shutil.rmtree(copy / part)
            shutil.copytree(base / part, copy / part)
    (copy / "flux1.safetensors").write_bytes(b"single file")
    (copy / "transformer" / "diffusion_flax_model.msgpack").write_bytes(b"flax")
    (copy / "text_encoder" / "model.onnx").write_bytes(b"onnx")
    model = resolve_base_model(str(copy))
    assert model.parameter_counts == resolve_base_model(str(base)).parameter_counts
    loaded = model.family.load(copy, "transformer").state_dict()
    for name, tensor in model.family.load(base, "transformer").state_dict().items():
        assert torch.equal(loaded[name], tensor.half().float()), name


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("transformer/config.json", {"in_channels": 384}, "noisy latents alone"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "flow matching"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    dev: Path, tmp_path: Path, file: str, change: dict[str, Any], told: str
) -> None:
    base = Path(shutil.copytree(dev, tmp_path / "base"))
    (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | change))
    with pytest.raises(InputError, match=told):
        resolve_base_model(str(base))


def test_a_side_that_cannot_be_packed_is_refused(dev: Path) -> None:
    with pytest.raises(InputError, match="multiple of 16"):
        resolve_base_model(str(dev)).settings.x0_shape(72)
