"""Tiny Stable Diffusion 1.5 and 2.1 as their repositories lie in the hub's cache: the layouts, with random weights.

Both name a feature extractor in model_index.json, the first a safety checker too, whose folders nobody has downloaded.
Beside the weights lie those of other programs: half-precision variants, pickles, single-file checkpoints.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

IDS = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd21": "stabilityai/stable-diffusion-2-1"}
RESOLUTION = 256  # less, as of diffusers 0.6, would be taken for 512
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_DETAILS: dict[str, dict[str, Any]] = {
    "sd15": {
        "unet": {"cross_attention_dim": 16, "attention_head_dim": 2},
        "text_encoder": {"hidden_size": 16, "hidden_act": "quick_gelu"},
        "scheduler": PNDMScheduler(**_BETAS, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1),
        "pad": "<|endoftext|>",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    },
    "sd21": {
        "unet": {"cross_attention_dim": 24, "attention_head_dim": (2, 4), "use_linear_projection": True},
        "text_encoder": {"hidden_size": 24, "hidden_act": "gelu"},
        "scheduler": DDIMScheduler(
            **_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
        ),
        "pad": "!",
        "safety_checker": [None, None],
    },
}


def write_hub_cache(cache: Path, name: str) -> Path:
    """Put a repository into a hub's cache (HF_HUB_CACHE); returns its snapshot."""
    files = cache.parent / f"{name}-files"
    write_repository(files, name)
    repository = cache / f"models--{IDS[name].replace('/', '--')}"
    commit = hashlib.sha1(name.encode()).hexdigest()
    snapshot = repository / "snapshots" / commit
    (repository / "blobs").mkdir(parents=True)
    for path in (path for path in files.rglob("*") if path.is_file()):
        content = path.read_bytes()
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / path.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (len(link.relative_to(repository).parts) - 1)
        link.symlink_to(f"{up}blobs/{blob.name}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return snapshot


def write_repository(folder: Path, name: str) -> None:
    """The files that are downloaded of one."""
    details = _DETAILS[name]
    ids = _write_tokenizer(folder / "tokenizer", pad=details["pad"])
    with torch.random.fork_rng():
        torch.manual_seed(len(name) + ids + details["unet"]["cross_attention_dim"])
        UNet2DConditionModel(
            sample_size=RESOLUTION // 4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4,
            **details["unet"],
        ).save_pretrained(folder / "unet", max_shard_size="150KB" if name == "sd21" else "5GB")
        AutoencoderKL(
            block_out_channels=(4, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
        ).save_pretrained(folder / "vae")
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=ids,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                bos_token_id=0,
                eos_token_id=2,
                **details["text_encoder"],
            )
        ).save_pretrained(folder / "text_encoder")
    details["scheduler"].save_pretrained(folder / "scheduler")
    _as_it_was_written_in_2022(folder)
    _write_what_is_not_read(folder)
    parts = {
        "scheduler": ["diffusers", type(details["scheduler"]).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": details["safety_checker"],
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", **parts}
    (folder / "model_index.json").write_text(json.dumps(index))


def _as_it_was_written_in_2022(folder: Path) -> None:
    """Names with `text_model.` and a buffer among the text encoder's weights; configurations of diffusers 0.6."""
    path = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, path, {"format": "pt"})
    for part in ("unet", "vae"):
        config = folder / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_diffusers_version": "0.6.0"}))


def _write_what_is_not_read(folder: Path) -> None:
    halves = {name: tensor.half() for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items()}
    save_file(halves, folder / "text_encoder" / "model.fp16.safetensors", {"format": "pt"})
    (folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"other weights")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"a single file")
    (folder / "README.md").write_text("words")


def _write_tokenizer(folder: Path, *, pad: str) -> int:
    """A CLIP tokenizer in four files, without tokenizer.json: bytes and a few words; returns the number of ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + place) for place in range(256 - len(printable))]
    vocabulary = dict.fromkeys([*symbols, *(f"{symbol}</w>" for symbol in symbols)])
    merges: dict[str, None] = {}
    for word in ("photo", "tfz", "rfz", "dog", "car", "of", "the"):
        left = word[0]
        for place, letter in enumerate(word[1:], start=2):
            right = letter + ("</w>" if place == len(word) else "")
            merges[f"{left} {right}"] = None
            left += right
            vocabulary[left] = None
    vocabulary |= dict.fromkeys(["<|startoftext|>", "<|endoftext|>"])
    folder.mkdir(parents=True)
    ids = {token: place for place, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = special | {"pad_token": pad, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": pad}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": True}))
    return len(ids)
