"""DreamSim and DINOv2 with random weights, much smaller, under the published files' and tensors' names."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, DEPTH, PATCH, SIDE, OUTPUT, RANK, ALPHA = 128, 2, 8, 32, 24, 4, 0.5
_FILES = {
    "dino_vitb16": "checkpoints/dino_vitbase16_pretrain.pth",
    "clip_vitb16": "clip_vitb16_pretrain.pth.tar",
    "open_clip_vitb16": "open_clip_vitb16_pretrain.pth.tar",
}
BRANCHES = tuple(_FILES)


def save_dreamsim(folder: Path, branches: tuple[str, ...] = BRANCHES) -> dict[str, dict[str, torch.Tensor]]:
    """Write a folder as the package leaves it; returns each branch's tensors with its LoRA merged."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, around: float = 0.0, by: float = 0.1) -> torch.Tensor:
        return around + by * torch.randn(*shape, generator=generator)

    adapter = folder / ("ensemble_lora" if len(branches) > 1 else f"{branches[0]}_single_lora")
    adapter.mkdir(parents=True)
    tuning, merged = {}, {}
    for place, branch in enumerate(branches):
        weights = {
            "cls_token": drawn(1, 1, WIDTH),
            "pos_embed": drawn(1, (SIDE // PATCH) ** 2 + 1, WIDTH),
            "patch_embed.proj.weight": drawn(WIDTH, 3, PATCH, PATCH),
            "patch_embed.proj.bias": drawn(WIDTH),
        }
        norms = ["norm", *(f"blocks.{block}.norm{which}" for block in range(DEPTH) for which in (1, 2))]
        norms += [] if branch == "dino_vitb16" else ["pos_drop"]
        for name in norms:
            weights |= {f"{name}.weight": drawn(WIDTH, around=1.0), f"{name}.bias": drawn(WIDTH)}
        for block in range(DEPTH):
            for name, inner, outer in (
                ("attn.qkv", WIDTH, 3 * WIDTH),
                ("attn.proj", WIDTH, WIDTH),
                ("mlp.fc1", WIDTH, 4 * WIDTH),
                ("mlp.fc2", 4 * WIDTH, WIDTH),
            ):
                weights[f"blocks.{block}.{name}.weight"] = drawn(outer, inner)
                weights[f"blocks.{block}.{name}.bias"] = drawn(outer)
        if branch != "dino_vitb16":
            weights["proj"] = drawn(WIDTH, OUTPUT)
        path = folder / _FILES[branch]
        path.parent.mkdir(exist_ok=True)
        torch.save(weights if branch == "dino_vitb16" else {"state_dict": weights}, path)
        whole = dict(weights)
        for block in range(DEPTH):
            first, second = drawn(RANK, WIDTH, by=1.0), drawn(3 * WIDTH, RANK, by=1.0)
            name = f"base_model.model.extractor_list.{place}.model.blocks.{block}.attn.qkv"
            tuning |= {f"{name}.lora_A.weight": first, f"{name}.lora_B.weight": second}
            whole[f"blocks.{block}.attn.qkv.weight"] = (
                weights[f"blocks.{block}.attn.qkv.weight"] + ALPHA / RANK * second @ first
            )
        merged[branch] = whole
    save_file(tuning, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.3, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["qkv"]}))
    return merged


def save_dinov2(folder: Path, *, seed: int = 0) -> None:
    """Write a small DINOv2 as facebook/dinov2-small lies on the hub, whose positions are interpolated."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    config = Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=70, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    settings = {
        "image_processor_type": "BitImageProcessor",
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "size": {"shortest_edge": 256},
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
