"""A base model of the size of Stable Diffusion 1.5 without weights: what a step takes doesn't depend on them."""

import json
import shutil
from pathlib import Path

import torch

from dreambooth.batches import Batch
from dreambooth.config import DreamBoothConfig, load_config
from dreambooth.empty_step import latent_shape
from dreambooth.families import family_of
from dreambooth.families.stable_diffusion import load_tokenizer
from dreambooth.miniature import PIPELINE_DIR
from dreambooth.model import Components, DreamBoothModel, build_model, load_schedule


def write_configurations(folder: Path) -> None:
    """The configurations of its parts (982.5 M parameters in UNet and text encoder), and the miniature's tokenizer."""
    for part in ("scheduler", "tokenizer"):
        shutil.copytree(PIPELINE_DIR / part, folder / part)
    shutil.copy(PIPELINE_DIR / "model_index.json", folder)
    changes: dict[str, dict[str, object]] = {
        "unet": {
            "block_out_channels": [320, 640, 1280, 1280],
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "norm_num_groups": 32,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        },
        "text_encoder": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "vocab_size": 49408,
        },
        "vae": {"block_out_channels": [128, 256, 512, 512]},
    }
    for part, change in changes.items():
        settings = json.loads((PIPELINE_DIR / part / "config.json").read_text()) | change
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(settings))


def configuration(directory: Path, *overrides: str) -> DreamBoothConfig:
    """Of a run that trains the base model in a directory."""
    subject = {"name": "rex", "class_noun": "car", "identifier": "tfz", "instance_images": "photos"}
    return load_config({"base_model": str(directory), "subject": subject}, overrides)


def random_model(directory: Path, config: DreamBoothConfig, *, device: str, autocast: bool = False) -> DreamBoothModel:
    """What a run trains, with the random weights that its layers start with, made on the device."""
    family = family_of(directory)
    denoiser, text_encoder = family.empty_components(directory, device=device)
    components = Components(
        family=family,
        directory=directory,
        denoiser=denoiser,
        text_encoder=text_encoder,
        schedule=load_schedule(directory),
    )
    return build_model(components, config, autocast=autocast)


def random_batch(directory: Path, *, pairs: int, resolution: int) -> Batch:
    """A batch of noise, on the CPU as the latent cache gives it."""
    shape = (2 * pairs, *latent_shape(directory, resolution))
    ids = torch.full((2 * pairs, load_tokenizer(directory).model_max_length), 5)
    return Batch(torch.randn(shape), torch.randn(shape), torch.randint(0, 1000, (2 * pairs,)), ids)
