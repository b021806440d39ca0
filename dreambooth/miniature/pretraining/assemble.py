"""Trained parts into the directories that are shipped, and scenes into the shipped subjects' images."""

import copy
import json
import random
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    IFPipeline,
    IFSuperResolutionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPModel, CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer, ViTModel

from dreambooth.miniature.pretraining.drawing import draw
from dreambooth.miniature.pretraining.t5_tokenizer import build_t5_tokenizer
from dreambooth.miniature.pretraining.tokenizer import build_tokenizer
from dreambooth.miniature.pretraining.world import PLACES, SUBJECTS, sample_scene

IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)
SUBJECT_SIZE = 128


def assemble_pipeline(
    folder: Path, *, vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> None:
    """Write a Stable Diffusion directory with fp16 weights, replacing what was there only once it is complete."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(),
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _save(pipeline, folder)


def assemble_flow_pipeline(
    folder: Path, *, vae: AutoencoderKL, transformer: SD3Transformer2DModel, towers: nn.ModuleList, shift: float
) -> None:
    """Write a Stable Diffusion 3 directory with fp16 weights and a T5 that says nothing.

    diffusers loads such a directory without a word that there is no T5, and decodes by a `shift_factor`.
    """
    vae = copy.deepcopy(vae)
    vae.register_to_config(shift_factor=0.0)
    pipeline = StableDiffusion3Pipeline(
        vae=vae,
        transformer=transformer,
        text_encoder=towers[0],
        text_encoder_2=towers[1],
        text_encoder_3=zero_t5(transformer.config.joint_attention_dim),
        tokenizer=build_tokenizer(),
        tokenizer_2=build_tokenizer(),
        tokenizer_3=T5Tokenizer(extra_ids=0),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )
    _save(pipeline, folder)


def assemble_cascade(
    folder: Path,
    *,
    small: UNet2DConditionModel,
    large: UNet2DConditionModel,
    t5: T5EncoderModel,
    schedulers: tuple[DDPMScheduler, DDPMScheduler, DDPMScheduler],
) -> None:
    """Write DeepFloyd IF's two directories, stage-1 and stage-2, with fp16 weights.

    `schedulers` are those of stage I, stage II, and of the noise on stage II's small picture.
    """
    of_small, of_large, noising = schedulers
    text = {"text_encoder": t5, "tokenizer": build_t5_tokenizer()}
    without = {"safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False}
    _save(IFPipeline(unet=small, scheduler=of_small, **text, **without), folder / "stage-1")
    scaling_up = IFSuperResolutionPipeline(
        unet=large, scheduler=of_large, image_noising_scheduler=noising, **text, **without
    )
    _save(scaling_up, folder / "stage-2")


def zero_t5(width: int) -> T5EncoderModel:
    """The smallest T5 there is, whose states (B, L, `width`) are zeros."""
    config = T5Config(
        vocab_size=len(T5Tokenizer(extra_ids=0)), d_model=width, d_kv=1, d_ff=1, num_layers=1, num_heads=1
    )
    t5 = T5EncoderModel(config).eval().requires_grad_(False)
    nn.init.zeros_(t5.encoder.final_layer_norm.weight)
    return t5


def _save(pipeline: DiffusionPipeline, folder: Path) -> None:
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline.save_pretrained(part)
    for weights in part.glob("*/*.safetensors"):
        _halve(weights)
    for config in part.glob("*/config.json"):
        _forget_origin(config)
    _swap(part, folder)


def assemble_encoder(folder: Path, model: ViTModel | CLIPModel) -> None:
    """Write the ViT or the CLIP with fp16 weights, its image processor configuration and any tokenizer."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    _halve(part / "model.safetensors")
    kind = "CLIP" if isinstance(model, CLIPModel) else "ViT"
    processor: dict[str, object] = {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 64} if kind == "CLIP" else {"height": 64, "width": 64},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }
    if kind == "CLIP":
        processor |= {"do_center_crop": True, "crop_size": {"height": 64, "width": 64}, "do_convert_rgb": True}
        build_tokenizer().save_pretrained(part)
    (part / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    _swap(part, folder)


def write_subjects(folder: Path) -> None:
    """Draw the shipped subjects: five instance images each, every one in another place and pose."""
    for name, look in SUBJECTS.items():
        rng = random.Random(f"subject {name}")
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index, place in enumerate((None, *rng.sample(PLACES, 4))):
            scene = sample_scene(rng, look, place=place, photo=True)
            draw(scene, SUBJECT_SIZE).save(folder / name / f"{index:02d}.png", optimize=True)
        (folder / name / "subject.yaml").write_text(f"name: {name}\nclass_noun: {look.class_noun}\n")


def _halve(weights: Path) -> None:
    """Keep the weights in fp16 on disk. The configuration goes on saying float32, which is what they are loaded as."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(halves, weights, metadata={"format": "pt"})


def _forget_origin(config: Path) -> None:
    """Leave out where a part was loaded from: diffusers records the path."""
    settings = json.loads(config.read_text())
    if settings.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _swap(part: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def parameter_count(module: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in module.parameters())


def float32(module: nn.Module) -> nn.Module:
    """A model on the CPU in float32, ready to be saved."""
    return module.to("cpu", torch.float32)
