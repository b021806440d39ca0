"""A base model of the size of Stable Diffusion 1.5 without weights: what a step takes doesn't depend on them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.batches import Batch
from dreambooth.miniature import PIPELINE_DIR, subject_dir
from dreambooth.models.base_model import BaseModel
from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.families import Family, Tensors, family_of
from dreambooth.training.model import Components, DreamBoothModel, build_model
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.published import PUBLISHED
from pipelines.plan.run_plan import Plan, make_plan


def write_configurations(folder: Path, *, narrower: int = 1) -> None:
    """The configurations of its parts (982.5 M parameters in UNet and text encoder), and the miniature's tokenizer.

    With `narrower` 2 or 4 every layer of UNet and text encoder has that fraction of its channels.
    """
    for part in ("scheduler", "tokenizer"):
        shutil.copytree(PIPELINE_DIR / part, folder / part)
    shutil.copy(PIPELINE_DIR / "model_index.json", folder)
    changes: dict[str, dict[str, object]] = {
        "unet": {
            "block_out_channels": [channels // narrower for channels in (320, 640, 1280, 1280)],
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 768 // narrower,
            "norm_num_groups": 32 if narrower == 1 else 16,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        },
        "text_encoder": {
            "hidden_size": 768 // narrower,
            "intermediate_size": 3072 // narrower,
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


def write_published(name: str, folder: Path) -> None:
    """The configurations of a published base model of CLIP's text encoders, and the miniature's tokenizer for each."""
    shutil.copytree(PUBLISHED / name, folder, dirs_exist_ok=True)
    for tokenizer in folder.glob("tokenizer*"):
        shutil.copy(PIPELINE_DIR / "tokenizer" / "tokenizer.json", tokenizer)


def configuration(directory: Path, *overrides: str) -> DreamBoothConfig:
    """Settings of a run that trains the base model in a directory."""
    subject = {"name": "rex", "class_noun": "car", "identifier": "tfz", "instance_images": "photos"}
    return load_config({"base_model": str(directory), "subject": subject}, overrides)


def plan_of(*overrides: str, gpus: int = 0) -> Plan:
    """Plan of a run on the miniature and its pictures."""
    photographs = str(subject_dir("coral-car"))
    subject = {"name": "rex", "class_noun": "car", "identifier": "tfz", "instance_images": photographs}
    return make_plan(load_config({"subject": subject}, overrides), Resources(cpus=8, gpus=gpus))


def plan_of_weightless(directory: Path, resolution: int, *overrides: str, gpus: int = 0) -> Plan:
    """Plan of the same run on a base model of which there are configurations alone."""
    small = plan_of(*overrides, gpus=gpus)
    images = small.config.images.model_copy(update={"resolution": resolution})
    base = BaseModel(address=str(directory), revision=None, directory=directory)
    family = family_of(directory)
    parts = {
        part.folder: family.empty(directory, part.folder)
        for part in (family.denoiser, *family.text_encoders(directory))
    }
    # Else read from the weights.
    vars(base)["parameter_counts"] = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return replace(small, config=small.config.model_copy(update={"images": images}), base=base)


def random_parts(directory: Path, config: DreamBoothConfig, *, device: str) -> Components:
    """What a run trains, with the random weights that its layers start with, made on the device."""
    family = family_of(directory)
    run = family.run_text_encoders(directory, config.train)
    return Components(
        family=family,
        directory=directory,
        denoiser=family.empty(directory, family.denoiser.folder, device=device),
        text_encoders={folder: family.empty(directory, folder, device=device) for folder in run},
    )


def random_model(directory: Path, config: DreamBoothConfig, *, device: str, autocast: bool = False) -> DreamBoothModel:
    """The model of a run on them."""
    return build_model(random_parts(directory, config, device=device), config, autocast=autocast)


def random_batch(directory: Path, config: DreamBoothConfig, *, pairs: int, resolution: int) -> Batch:
    """A batch of noise, on the CPU as the latent cache gives it: moments, text and conditions are of the family's kind.

    Nothing is encoded for it: vocabularies, and text encoders that a run leaves frozen, may be missing.
    """
    settings, count, size = BaseSettings(directory), 2 * pairs, (resolution, resolution)
    family, shape = settings.family, settings.x0_shape(resolution)
    process, rng = family.process(directory, shape), torch.Generator().manual_seed(0)
    x0 = torch.randn(count, *shape)
    known = family.conditions([size] * count, [(0, 0)] * count, size)
    of_each = [{name: part[place] for name, part in known.items()} for place in range(count)]
    drawn = [family.draw_conditions(process, one, own, rng) for one, own in zip(x0, of_each, strict=True)]
    return Batch(
        latents=x0,
        noise=torch.randn(x0.shape),
        timesteps=torch.stack([process.draw(rng) for _ in range(count)]),
        text=_random_text(family, directory, config, count),
        conditions={name: torch.stack([one[name] for one in drawn]) for name in drawn[0]},
    )


def _random_text(family: Family, directory: Path, config: DreamBoothConfig, count: int) -> Tensors:
    """Tokens of text encoders that every step runs, and random states of the others, by their shapes."""
    blank = {name: one.expand(count, *one.shape[1:]) for name, one in family.blank_tokens(directory).items()}
    on_meta = {name: one.to("meta") for name, one in blank.items()}
    run = family.run_text_encoders(directory, config.train)
    text = {name: one.clone() for name, one in blank.items() if name.partition(".")[0] in run}
    for part in family.text_encoders(directory):
        if part.folder in run:
            continue
        with torch.no_grad():
            shapes = family.encode_with(part.folder, family.empty(directory, part.folder).eval(), on_meta)
        for name, one in shapes.items():
            made = torch.randn if one.is_floating_point() else torch.ones
            text[name] = made(one.shape, dtype=one.dtype)
    return text
