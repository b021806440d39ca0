"""Add a family of base models: Stable Diffusion on CLIP's layer before the last ("clip skip").

In the package a family is one file in dreambooth/models/families/ and a line in FAMILIES, so Ray's workers know it,
too; this script adds it to its own process alone, and fine-tunes a copy of the miniature.
"""

import json
import shutil
from pathlib import Path

import dreambooth as db
from dreambooth.miniature import PIPELINE_DIR
from dreambooth.models import families
from dreambooth.models.families.stable_diffusion import StableDiffusion, dpm_solver
from dreambooth.models.families.tokenizers import padded_ids
from dreambooth.quiet import quiet

quiet()  # before importing diffusers, which would warn of every optional package that isn't installed

from diffusers import StableDiffusionPipeline  # noqa: E402


class ClipSkipPipeline(StableDiffusionPipeline):
    """The class that model_index.json names, so that the family is found."""


class ClipSkip(StableDiffusion):
    """What differs from Stable Diffusion: where the text's states come from."""

    name = "Stable Diffusion on CLIP's layer before the last"
    pipeline_class = "ClipSkipPipeline"

    def encode_with(self, folder, text_encoder, tokens):
        hidden = text_encoder(tokens[f"{folder}.input_ids"], output_hidden_states=True).hidden_states[-2]
        return {f"{folder}.states": text_encoder.final_layer_norm(hidden)}  # (N, L, D)

    def without_gradient(self, owner, module):
        if owner == "denoiser":
            return ()
        last = len(module.encoder.layers) - 1
        return [name for name, _ in module.named_parameters() if name.startswith(f"encoder.layers.{last}.")]

    def prompt_arguments(self, pipeline, prompts, *, guided):
        ids = padded_ids(pipeline.tokenizer, [*prompts, ""]).to(pipeline.device)
        encoded = self.encode_with("text_encoder", pipeline.text_encoder, {"text_encoder.input_ids": ids})
        *_, blank = states = encoded["text_encoder.states"]
        return {"prompt_embeds": states[:-1], "negative_prompt_embeds": blank.expand_as(states[:-1])}

    def pipeline(self, directory, modules):
        made = ClipSkipPipeline(
            **modules,
            tokenizer=self.tokenizer(directory),
            scheduler=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        made.scheduler = dpm_solver(directory)
        return made


families.FAMILIES += (ClipSkip(),)

base = Path("clip-skip-base")
shutil.copytree(PIPELINE_DIR, base, dirs_exist_ok=True)
index = json.loads((base / "model_index.json").read_text())
(base / "model_index.json").write_text(json.dumps(index | {"_class_name": "ClipSkipPipeline"}))

photographs = str(db.subject_dir("coral-car"))
subject = {"name": "coral-car", "class_noun": "car", "identifier": "tfz", "instance_images": photographs}
settings = {"subject": subject, "base_model": str(base), "images": {"resolution": 64}}
config = db.load_config(
    settings | {"train": {"max_train_steps": 5, "learning_rate": 5e-4}, "prior": {"prior_loss_weight": 0}}
)
engine = db.TorchEngine(db.load_model(base, config), config.train)
data = db.prepare_data(base, config, db.find_instance_images([photographs]), [])
db.fit(engine, data, config.train, on_step=lambda step, metrics: print(step, metrics.loss))
db.export_pipeline(base, engine.state_dict(), Path("clip-skip-car"))

pipeline = db.load_pipeline(Path("clip-skip-car"))
[picture] = db.sample(pipeline, ["a photo of tfz car"], [0], num_inference_steps=12, guidance_scale=4.0)
picture.save("clip-skip-car.png")
