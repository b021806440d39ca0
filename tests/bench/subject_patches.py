"""How well do DINO's figures tell a subject from others of its class? The table of docs/metrics.md.

    python tests/bench/subject_patches.py

Twenty looks drawn by the miniature's world, five masked photographs and ten samples each: the same look in any place,
or another look of the class in the same ones; each in a usual pose, and small at the edge. Figures go to
output/bench/subject_patches.json.
"""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from stamps import stamp, stamped

from dreambooth.evaluation.banks import load_bank
from dreambooth.evaluation.metrics import fidelity
from dreambooth.evaluation.patches import MaskedPhotograph
from dreambooth.miniature.pretraining.drawing import draw
from dreambooth.miniature.pretraining.shapes import draw_subject
from dreambooth.miniature.pretraining.world import CLASS_NOUNS, PLACES, Scene, sample_look, sample_scene

OUTPUT = Path("output/bench/subject_patches.json")
LOOKS, PHOTOGRAPHS, SAMPLES = 20, 5, 10


def mask_of(scene: Scene) -> Image.Image:
    """Mask of a scene's subject, 64 x 64, mode L: what is the same on a black and on a white canvas."""
    on = []
    for colour in ("black", "white"):
        canvas = Image.new("RGB", (512, 512), colour)
        draw_subject(canvas, scene, random.Random(scene.seed))
        on.append(np.asarray(canvas))
    return Image.fromarray((on[0] == on[1]).all(axis=2)).convert("L").resize((64, 64), Image.Resampling.BOX)


def area_under_curve(own: Sequence[float], others: Sequence[float]) -> float:
    """The probability that one of `own` is above one of `others`."""
    first, second = np.asarray(own)[:, None], np.asarray(others)[None]
    return float(((first > second) + 0.5 * (first == second)).mean())


def main() -> None:
    """Print the table, and write it."""
    torch.set_num_threads(1)
    at = stamp()
    bank, rng = load_bank("miniature"), random.Random(1)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    areas: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(LOOKS):
        noun = CLASS_NOUNS[number % len(CLASS_NOUNS)]
        look, other = sample_look(rng, noun), sample_look(rng, noun)
        scenes = [sample_scene(rng, look, photo=True) for _ in range(PHOTOGRAPHS)]
        masks = [mask_of(scene) for scene in scenes]
        real = [MaskedPhotograph(picture=draw(s).convert("RGB"), mask=m) for s, m in zip(scenes, masks, strict=True)]
        white = Image.new("RGB", (64, 64), "white")
        alone = bank.embed_images([Image.composite(each.picture, white, each.mask) for each in real]).dino
        whole = bank.embed_images([each.picture for each in real]).dino
        places = [rng.choice(PLACES) for _ in range(SAMPLES)]
        poses: dict[str, dict[str, Any]] = {"usual": {}, "small, at the edge": {"scale": 0.5, "offset": (0.28, 0.15)}}
        for pose, changes in poses.items():
            scores: dict[tuple[str, str], list[float]] = {}
            for whose, each in (("own", look), ("other", other)):
                wanted = [replace(sample_scene(rng, each, place=p, photo=True), **changes) for p in places]
                samples = [draw(scene).convert("RGB") for scene in wanted]
                dino = bank.embed_images(samples).dino
                scores["dino", whose] = fidelity(dino, whole).tolist()
                scores["dino_subject", whose] = fidelity(dino, alone).tolist()
                scores["dino_subject_patches", whose] = bank.subject_similarities(samples, real).mean(dim=1).tolist()
            for name in ("dino", "dino_subject", "dino_subject_patches"):
                areas[name, pose].append(area_under_curve(scores[name, "own"], scores[name, "other"]))
                for whose in ("own", "other"):
                    found[name, f"{pose}, {whose}"] += scores[name, whose]
    rows = {}
    for (name, pose), values in areas.items():
        own, others = (float(np.mean(found[name, f"{pose}, {whose}"])) for whose in ("own", "other"))
        rows[f"`{name}`, {pose}"] = {"own": own, "other": others, "area": float(np.mean(values))}
        print(f"{name:22s} {pose:20s} own {own:.2f}  other {others:.2f}  area under the curve {np.mean(values):.2f}")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(stamped(rows, at), indent=2) + "\n")


if __name__ == "__main__":
    main()
