"""How well are copies of photographs told from new pictures? The table of docs/metrics.md.

    python tests/bench/near_copies.py

Twenty looks drawn by the miniature's world, five photographs each: what is a copy is known here. Figures go to
output/bench/near_copies.json.
"""

import json
import random
from collections import defaultdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageChops
from stamps import stamp, stamped

from dreambooth.evaluation.banks import load_bank
from dreambooth.evaluation.metrics import near_copies
from dreambooth.miniature import PIPELINE_DIR
from dreambooth.miniature.pretraining.drawing import draw
from dreambooth.miniature.pretraining.photographs import to_pixels
from dreambooth.miniature.pretraining.world import CLASS_NOUNS, PLACES, Look, sample_look, sample_scene
from dreambooth.quiet import quiet

OUTPUT = Path("output/bench/near_copies.json")
LOOKS, PHOTOGRAPHS = 20, 5


@torch.no_grad()
def through(vae: AutoencoderKL, images: list[Image.Image], noise: float) -> list[Image.Image]:
    """Pictures encoded, given noise of so many standard deviations, and decoded."""
    latents = vae.encode(torch.from_numpy(to_pixels(images))).latent_dist.mode()
    generator = torch.Generator().manual_seed(0)
    latents += noise * latents.std() * torch.randn(latents.shape, generator=generator)
    pixels = vae.decode(latents).sample.clamp(-1, 1).permute(0, 2, 3, 1)
    return [Image.fromarray(((each.numpy() + 1) * 127.5).astype("uint8")) for each in pixels]


def main() -> None:
    quiet()
    at = stamp()
    bank, vae = load_bank("miniature"), AutoencoderKL.from_pretrained(PIPELINE_DIR / "vae").eval()
    rng = random.Random(1)
    found: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for number in range(LOOKS):
        look = sample_look(rng, CLASS_NOUNS[number % len(CLASS_NOUNS)])
        places = rng.sample(list(PLACES), 2 * PHOTOGRAPHS)

        def drawn(wanted: list[str], look: Look = look) -> list[Image.Image]:
            return [draw(sample_scene(rng, look, place=place, photo=True)) for place in wanted]

        real = drawn(places[:PHOTOGRAPHS])
        pictures = {
            "the subject in places that no photograph shows": drawn(places[PHOTOGRAPHS:]),
            "in a photograph's place, in a new pose": drawn(places[:PHOTOGRAPHS]),
            "photographs through the autoencoder": through(vae, real, 0.1),
            "the same, shifted by two pixels": through(vae, [ImageChops.offset(image, 2, 1) for image in real], 0.2),
            "the same, with much noise in the latents": through(vae, real, 0.4),
            "mirrored photographs": [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in real],
        }
        for name, images in pictures.items():
            clip, real_clip = bank.embed_images(images).clip, bank.embed_images(real).clip
            distances = bank.perceptual_distances([*images, *real])
            across, among = distances[: len(images), len(images) :], distances[len(images) :, len(images) :]
            with_distances = near_copies(clip, real_clip, distances=across, real_distances=among)
            found[name] += zip(near_copies(clip, real_clip).tolist(), with_distances.tolist(), strict=True)
    rows = {}
    for name, pairs in found.items():
        alone, both = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        rows[name] = {"clip_alone": alone, "with_distances": both, "pictures": len(pairs)}
        print(f"{name:50s} {alone:.2f} {both:.2f}  of {len(pairs)}")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(stamped(rows, at), indent=2) + "\n")


if __name__ == "__main__":
    main()
