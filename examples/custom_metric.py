"""Measure samples by a figure of your own, next to those of the package.

The figure says how much closer samples are to the subject than the base model's samples of the class, as a share of the
photographs' own closeness. Give the folder of a trained model; without one the base model is measured, whose share is
near 0:

    python examples/custom_metric.py [output/coral-car/…/model]
"""

import sys
from pathlib import Path

from PIL import Image

import dreambooth as db

subject, class_noun = "coral-car", "car"
base = db.resolve_base_model("miniature").directory
model = Path(sys.argv[1]) if len(sys.argv) > 1 else base
sampler = {"num_inference_steps": 12, "guidance_scale": 4.0}

photographs = [Image.open(image.address) for image in db.find_instance_images([str(db.subject_dir(subject))])]
samples = db.sample(db.load_pipeline(model), [f"a photo of tfz {class_noun}"] * 4, range(4), **sampler)
before = db.sample(db.load_pipeline(base), [f"a photo of a {class_noun}"] * 4, range(4), **sampler)

bank = db.load_bank("miniature")  # "paper" for DINO ViT-S/16 and CLIP ViT-B/32
real, made, plain = (bank.embed_images(images).dino for images in (photographs, samples, before))


def closeness(images, subject):
    """Mean cosine similarity of embeddings (N, D) to those of the subject (M, D), which have unit norm."""
    return float((images @ subject.T).mean())


share = (closeness(made, real) - closeness(plain, real)) / (closeness(real, real) - closeness(plain, real))
print(f"dino {closeness(made, real):.2f}, share of the way to the photographs {share:.2f}")
