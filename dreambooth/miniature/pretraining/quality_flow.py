"""How good is miniature-flow? The figures of its card, measured again as the miniature's are.

    python -m dreambooth.miniature.pretraining.quality_flow                   # rewrites weights/flow/quality.json
    python -m dreambooth.miniature.pretraining.quality_flow --grid docs/images/miniature-flow-samples.png

The prompts name combinations of class noun, colour and place that the denoiser was never shown. The judge's text tower
is one of the model's own text encoders, which may flatter the figures.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPModel, CLIPTokenizer

from dreambooth.miniature import CLIP_DIR, FLOW_DIR
from dreambooth.miniature.pretraining.quality import follows_prompts, grid, sample, write_figures
from dreambooth.quiet import quiet
from dreambooth.sampling.sampler import sampling_dtype

BOUNDS = {"prompt_class_noun": 0.97, "prompt_colour": 0.99, "prompt_place": 0.99}
"""What shipped weights reach at least."""
STEPS, GUIDANCE = 16, 4.0


def main() -> None:
    """Measure and write quality.json, or draw the grid."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=FLOW_DIR, help="folder that holds pipeline")
    parser.add_argument("--grid", type=Path, help="only write a picture of samples there")
    arguments = parser.parse_args()
    pipeline = StableDiffusion3Pipeline.from_pretrained(arguments.weights / "pipeline", torch_dtype=torch.float32)
    sampler = partial(sample, pipeline, steps=STEPS, guidance=GUIDANCE)
    with torch.autocast("cpu", torch.bfloat16, enabled=sampling_dtype("cpu") is torch.bfloat16):
        if arguments.grid:
            arguments.grid.parent.mkdir(parents=True, exist_ok=True)
            grid(sampler).save(arguments.grid, optimize=True)
            return
        clip = CLIPModel.from_pretrained(CLIP_DIR, dtype=torch.float32).eval()
        found = follows_prompts(sampler, clip, CLIPTokenizer.from_pretrained(CLIP_DIR))
    figures = {f"prompt_{name}": round(share, 4) for name, share in found.items()}
    write_figures(arguments.weights, figures, BOUNDS)


if __name__ == "__main__":
    main()
