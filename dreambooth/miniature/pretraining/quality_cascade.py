"""How good is miniature-cascade? The figures of its card, measured again as the miniature's are.

    python -m dreambooth.miniature.pretraining.quality_cascade      # rewrites weights/cascade/quality.json
    … --sheet docs/images/miniature-cascade-samples.png             # and keeps the samples, ten a row

The prompts name combinations of class noun, colour and place that stage I was never shown; both stages draw the
samples. Stage II is also measured by itself, against bilinear interpolation of fresh scenes reduced to its input: by
peak signal-to-noise ratio, and by the ViT's similarity to the scene.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from dreambooth.miniature import CASCADE_DIR, CLIP_DIR, VIT_DIR
from dreambooth.miniature.pretraining.captions import held_out_prompts, prompt
from dreambooth.miniature.pretraining.drawing import draw
from dreambooth.miniature.pretraining.photographs import to_pixels
from dreambooth.miniature.pretraining.quality import sheet_of, top1, write_figures
from dreambooth.miniature.pretraining.train_cascade import LARGE_SIDE, SMALL_SIDE
from dreambooth.miniature.pretraining.train_vit import embed
from dreambooth.miniature.pretraining.world import sample_scene
from dreambooth.quiet import quiet
from dreambooth.sampling.sampler import load_pipeline, sample

BOUNDS = {
    "prompt_class_noun": 0.9,
    "prompt_colour": 0.8,
    "prompt_place": 0.95,
    "psnr_over_bilinear": -1.0,
    "vit_over_bilinear": 0.0,
}
"""What shipped weights reach at least: shares of prompts, and stage II's dB and similarity above interpolation's."""
STEPS, GUIDANCE = 12, 3.0
SCENES = 40


def sampled(pipeline: Any, prompts: list[str], seed: int) -> list[Image.Image]:
    """One image for each prompt by both stages, as runs sample them; the n-th image has seed + n."""
    seeds = range(seed, seed + len(prompts))
    return sample(pipeline, prompts, seeds, num_inference_steps=STEPS, guidance_scale=GUIDANCE, batch_size=25)


@torch.no_grad()
def scaled_up(pipeline: Any, vit: ViTModel) -> dict[str, float]:
    """Stage II and bilinear interpolation on fresh scenes: mean dB, and cosine similarity by the ViT."""
    rng = random.Random("quality cascade")
    scenes = [draw(sample_scene(rng), LARGE_SIDE) for _ in range(SCENES)]
    small = [scene.reduce(LARGE_SIDE // SMALL_SIDE) for scene in scenes]
    stage, size = pipeline.super_resolution, (LARGE_SIDE, LARGE_SIDE)
    sides = {"height": LARGE_SIDE, "width": LARGE_SIDE}
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 1.0, **sides}
    true, seeds = torch.from_numpy(to_pixels(scenes)), range(SCENES)
    pictures = {
        "stage_ii": sample(stage, [""] * SCENES, seeds, images=small, batch_size=25, **settings),
        "bilinear": [image.resize(size, Image.Resampling.BILINEAR) for image in small],
    }
    figures = {}
    for name, images in pictures.items():
        pixels = torch.from_numpy(to_pixels(images))
        figures[f"{name}_psnr"] = float((-10 * (((pixels - true) / 2) ** 2).mean((1, 2, 3)).log10()).mean())
        figures[f"{name}_vit"] = float((_embedded(vit, pixels) * _embedded(vit, true)).sum(1).mean())
    over = {
        f"{kind}_over_bilinear": figures[f"stage_ii_{kind}"] - figures[f"bilinear_{kind}"] for kind in ("psnr", "vit")
    }
    return figures | over


def _embedded(vit: ViTModel, pixels: Tensor) -> Tensor:
    """Embeddings (N, D) of length 1 of pixels (N, 3, H, W)."""
    return torch.cat([embed(vit, chunk) for chunk in pixels.split(100)])


def main() -> None:
    """Measure and write quality.json, and draw the sheet if asked."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=CASCADE_DIR, help="folder that holds stage-1 and stage-2")
    parser.add_argument("--sheet", type=Path, help="write a picture of the samples there, too")
    arguments = parser.parse_args()
    pipeline = load_pipeline(arguments.weights / "stage-1", super_resolution=arguments.weights / "stage-2")
    clip = CLIPModel.from_pretrained(CLIP_DIR, dtype=torch.float32).eval()
    vit = ViTModel.from_pretrained(VIT_DIR, add_pooling_layer=False, dtype=torch.float32).eval()
    asked = [*held_out_prompts()]
    images = sampled(pipeline, [prompt(*triple) for triple in asked], 0)
    if arguments.sheet:
        sheet_of(images, columns=10, side=64).save(arguments.sheet, optimize=True)
    found = top1(clip, CLIPTokenizer.from_pretrained(CLIP_DIR), images, asked)
    figures = {f"prompt_{name}": share for name, share in found.items()} | scaled_up(pipeline, vit)
    rounded = {name: round(value, 4) for name, value in figures.items()}
    write_figures(arguments.weights, rounded, BOUNDS)


if __name__ == "__main__":
    main()
