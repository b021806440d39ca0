"""How good is the miniature? Every figure of the model card, measured again.

    python -m dreambooth.miniature.pretraining.quality                                 # rewrites weights/quality.json
    python -m dreambooth.miniature.pretraining.quality --grid docs/images/miniature-samples.png

All scenes here are fresh ones, the subjects unseen, the photographs of subjects that no training saw, and the prompts
name combinations of class noun, colour and place that the denoiser was never shown.
"""

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from dreambooth.miniature import WEIGHTS_DIR
from dreambooth.miniature.pretraining.captions import held_out_prompts, prompt
from dreambooth.miniature.pretraining.drawing import draw
from dreambooth.miniature.pretraining.photographs import load_photographs, to_pixels
from dreambooth.miniature.pretraining.train_vit import embed
from dreambooth.miniature.pretraining.world import CLASS_NOUNS, COLOURS, PLACES, Scene, sample_look, sample_scene
from dreambooth.quiet import quiet

GRID_PROMPTS = (
    "a photo of a dog on the grass",
    "a photo of a red car at night",
    "a photo of a blue cat on the beach",
    "a photo of a yellow bird in the snow",
    "a photo of a turquoise teapot in the desert",
    "a photo of a pink boat in the water",
    "a photo of a purple backpack with spots in the city",
    "a painting of an orange fish on a red carpet",
)
STEPS, GUIDANCE = 20, 4.5
PER_PROMPT = 3

Sampler = Callable[[list[str], int], list[Image.Image]]
"""One image for each prompt, of which the n-th has the seed given + n."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The figures: dB, areas under curves, and shares from 0 to 1. None: not measured, for want of photographs."""

    vae_psnr_scenes: float
    vae_psnr_photographs: float | None
    vit_auc: float
    vit_auc_photographs: float | None
    clip_class_noun: float
    clip_colour: float
    clip_place: float
    prompt_class_noun: float
    prompt_colour: float
    prompt_place: float


BOUNDS = {
    "vae_psnr_scenes": 26.0,
    "vae_psnr_photographs": 20.0,
    "vit_auc": 0.95,
    "clip_class_noun": 0.85,
    "clip_colour": 0.85,
    "clip_place": 0.85,
    "prompt_class_noun": 0.90,
    "prompt_colour": 0.80,
    "prompt_place": 0.85,
}


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Sequence[Image.Image]) -> float:
    """Mean peak signal-to-noise ratio of reconstructions from the posterior's mean, in dB."""
    ratios = []
    for pixels in torch.from_numpy(to_pixels(list(images))).split(64):
        output = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        ratios.append(-10 * (((output - pixels) / 2) ** 2).mean((1, 2, 3)).log10())
    return float(torch.cat(ratios).mean())


def verification_auc(embeddings: Tensor, subjects: Sequence[int], groups: Sequence[str]) -> float:
    """The chance that two views of one subject are more alike than two of different ones in a group: (N, D) normed."""
    similarity = (embeddings @ embeddings.T).numpy()
    same_subject = np.equal.outer(np.asarray(subjects), np.asarray(subjects))
    same_group = np.equal.outer(np.asarray(groups), np.asarray(groups))
    above = np.triu(np.ones_like(same_subject), 1)
    same, other = similarity[above & same_subject], similarity[above & ~same_subject & same_group]
    return float((np.searchsorted(np.sort(other), same) / len(other)).mean())


@torch.no_grad()
def vit_auc(vit: ViTModel, *, subjects_per_class: int = 20, views: int = 5) -> float:
    """Verification AUC within a class, over subjects that no training saw."""
    rng = random.Random("quality vit")
    images: list[Image.Image] = []
    subjects: list[int] = []
    groups: list[str] = []
    for class_noun in CLASS_NOUNS:
        for _ in range(subjects_per_class):
            look = sample_look(rng, class_noun)
            images += [draw(sample_scene(rng, look, photo=True)) for _ in range(views)]
            subjects += [len(groups)] * views
            groups += [class_noun] * views
    embeddings = torch.cat([embed(vit, chunk) for chunk in torch.from_numpy(to_pixels(images)).split(128)])
    return verification_auc(embeddings, subjects, groups)


@torch.no_grad()
def vit_auc_photographs(vit: ViTModel, folder: Path) -> float:
    """Verification AUC over the photographs of the held-out subjects."""
    photographs = load_photographs(folder, held_out=True)
    subjects = [index for index, several in enumerate(photographs.by_subject.values()) for _ in several]
    embeddings = embed(vit, torch.from_numpy(to_pixels(photographs.centre_crops())))
    return verification_auc(embeddings, subjects, [""] * len(subjects))


@torch.no_grad()
def top1(
    clip: CLIPModel, tokenizer: CLIPTokenizer, images: list[Image.Image], facts: list[tuple[str, str, str]]
) -> dict[str, float]:
    """How often the right one of ten captions is the CLIP's choice: class noun, colour and place varied in turn."""
    hits = {}
    for position, (name, words) in enumerate(
        (("class_noun", CLASS_NOUNS), ("colour", tuple(COLOURS)), ("place", PLACES))
    ):
        right = 0
        for start in range(0, len(images), 50):
            chunk = facts[start : start + 50]
            captions = [prompt(*(*fact[:position], word, *fact[position + 1 :])) for fact in chunk for word in words]
            tokens = tokenizer(captions, padding=True, return_tensors="pt")
            pixels = torch.from_numpy(to_pixels(images[start : start + 50]))
            output = clip(input_ids=tokens.input_ids, pixel_values=pixels)
            scores = torch.einsum(
                "nd,nwd->nw", output.image_embeds, output.text_embeds.view(len(chunk), len(words), -1)
            )
            wanted = torch.tensor([words.index(fact[position]) for fact in chunk])
            right += int((scores.argmax(1) == wanted).sum())
        hits[name] = right / len(images)
    return hits


def sample(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seed: int,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch_size: int = 25,
) -> list[Image.Image]:
    """One image for each prompt by the pipeline's own sampler; the n-th image has seed + n."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="samples", dynamic_ncols=True):
        chunk = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(chunk))]
        images += pipeline(
            chunk, num_inference_steps=steps, guidance_scale=guidance, generator=generators, height=64, width=64
        ).images
    return images


def follows_prompts(sampler: Sampler, clip: CLIPModel, tokenizer: CLIPTokenizer) -> dict[str, float]:
    """How often samples of the held-out prompts show what these name, by the CLIP: `top1` of each of the three."""
    asked = [triple for triple in held_out_prompts() for _ in range(PER_PROMPT)]
    return top1(clip, tokenizer, sampler([prompt(*triple) for triple in asked], 0), asked)


def measure(weights: Path, photographs: Path | None) -> Quality:
    """All figures of the weights in a folder that holds pipeline, vit and clip."""
    pipeline = StableDiffusionPipeline.from_pretrained(weights / "pipeline")
    vit = ViTModel.from_pretrained(weights / "vit", add_pooling_layer=False, dtype=torch.float32).eval()
    clip = CLIPModel.from_pretrained(weights / "clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(weights / "clip")
    rng = random.Random("quality")
    scenes = [sample_scene(rng) for _ in range(300)]
    held_out = load_photographs(photographs, held_out=True).centre_crops() if photographs else []

    nameable: list[Scene] = []
    while len(nameable) < 500:
        scene = sample_scene(rng, place=rng.choice(PLACES), photo=True)
        if scene.look.colour_name is not None:
            nameable.append(scene)
    facts = [(scene.look.class_noun, str(scene.look.colour_name), str(scene.place)) for scene in nameable]
    on_scenes = top1(clip, tokenizer, [draw(scene) for scene in nameable], facts)
    on_samples = follows_prompts(partial(sample, pipeline), clip, tokenizer)
    return Quality(
        vae_psnr_scenes=psnr(pipeline.vae, [draw(scene) for scene in scenes]),
        vae_psnr_photographs=psnr(pipeline.vae, held_out) if held_out else None,
        vit_auc=vit_auc(vit),
        vit_auc_photographs=vit_auc_photographs(vit, photographs) if photographs else None,
        clip_class_noun=on_scenes["class_noun"],
        clip_colour=on_scenes["colour"],
        clip_place=on_scenes["place"],
        prompt_class_noun=on_samples["class_noun"],
        prompt_colour=on_samples["colour"],
        prompt_place=on_samples["place"],
    )


def grid(sampler: Sampler, *, columns: int = 6, side: int = 128) -> Image.Image:
    """Samples of GRID_PROMPTS, one row each, enlarged to `side` pixels."""
    prompts = [text for text in GRID_PROMPTS for _ in range(columns)]
    return sheet_of(sampler(prompts, 1000), columns=columns, side=side)


def sheet_of(images: Sequence[Image.Image], *, columns: int, side: int) -> Image.Image:
    """Pictures in rows of `columns`, enlarged to `side` pixels."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 4) - 4, rows * (side + 4) - 4), "white")
    for index, image in enumerate(images):
        place = (index % columns * (side + 4), index // columns * (side + 4))
        sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), place)
    return sheet


def write_figures(weights: Path, figures: Mapping[str, float | None], bounds: Mapping[str, float]) -> None:
    """Write quality.json into a folder of weights, and print each figure beside what it has to reach."""
    (weights / "quality.json").write_text(json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        bound = bounds.get(name)
        verdict = "" if bound is None or value is None else f"  (at least {bound}: {'yes' if value >= bound else 'NO'})"
        print(f"{name:24s} {value}{verdict}")


def main() -> None:
    """Measure and write quality.json, or draw the grid."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS_DIR, help="folder of pipeline, vit and clip")
    parser.add_argument(
        "--photographs", type=Path, help="folder of one folder of photographs per subject; left out: not measured"
    )
    parser.add_argument("--grid", type=Path, help="only write a picture of samples there")
    arguments = parser.parse_args()
    if arguments.grid:
        arguments.grid.parent.mkdir(parents=True, exist_ok=True)
        pipeline = StableDiffusionPipeline.from_pretrained(arguments.weights / "pipeline")
        grid(partial(sample, pipeline)).save(arguments.grid, optimize=True)
        return
    figures = asdict(measure(arguments.weights, arguments.photographs))
    rounded = {name: None if value is None else round(value, 4) for name, value in figures.items()}
    write_figures(arguments.weights, rounded, BOUNDS)


if __name__ == "__main__":
    main()
