"""Train the miniature, all of it, from nothing but the program that draws its world.

    python -m dreambooth.miniature.pretraining.pretrain --output output/miniature --photographs DIR

The autoencoder goes first and is refined; beside that, in another process, the CLIP and then the ViT; then the
denoiser and the text encoder, on a CPU in two processes. For a GPU further processes draw the batches. Every stage
ends at its number of steps or its minutes, whichever comes first, and the same command goes on where a stopped one was.
At the end the weights lie in OUTPUT/weights in the layout that is shipped, measured.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.multiprocessing.spawn import spawn
from transformers import CLIPModel, ViTModel

from dreambooth.miniature.pretraining import train_clip, train_unet, train_vae, train_vit
from dreambooth.miniature.pretraining.assemble import assemble_encoder, assemble_pipeline, write_subjects
from dreambooth.miniature.pretraining.photographs import Photographs, load_photographs
from dreambooth.miniature.pretraining.quality import measure
from dreambooth.miniature.pretraining.stage import Stage
from dreambooth.quiet import quiet

STAGES = (train_vae.STAGE, train_vae.REFINE_STAGE, train_clip.STAGE, train_vit.STAGE, train_unet.STAGE)


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Settings of a pretraining."""

    output: Path
    device: str
    photographs: Path | None
    minutes: float | None
    """Minutes of autoencoder, its refinement and denoiser together, which follow each other; None: the stages' own."""

    @property
    def states(self) -> Path:
        """Where the stages keep what they need to go on."""
        return self.output / "states"

    @property
    def on_cpu(self) -> bool:
        """Whether training and drawing share the same cores."""
        return self.device == "cpu"

    @property
    def drawers(self) -> int:
        """Processes that draw for one that trains."""
        return 0 if self.on_cpu else max(1, min(4, (os.cpu_count() or 1) // 2 - 1))

    def load_photographs(self) -> Photographs:
        """The photographs to train on; without a folder, none."""
        return load_photographs(self.photographs) if self.photographs else Photographs(by_subject={})

    def stage(self, stage: Stage) -> Stage:
        """A stage with its share of the minutes."""
        whole = train_vae.STAGE.minutes + train_vae.REFINE_STAGE.minutes + train_unet.STAGE.minutes
        return stage if self.minutes is None else replace(stage, minutes=stage.minutes * self.minutes / whole)

    def options(self, stage: Stage) -> dict[str, Any]:
        """How a stage is trained here."""
        return {"device": torch.device(self.device), "stage": self.stage(stage), "drawers": self.drawers}


def main() -> None:
    """Read the command line, say the plan, train what is missing, assemble and measure."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="states, finished parts and, at the end, weights go there"
    )
    parser.add_argument("--photographs", type=Path, help="folder of one folder of .jpg photographs per subject")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--minutes", type=float, help="for all of it; every stage gets its share")
    pretraining = Pretraining(**vars(parser.parse_args()))
    at_once = min(2, os.cpu_count() or 1)
    print(f"plan: {pretraining.device}, {at_once} stage(s) at a time, results in {pretraining.output / 'weights'}")
    for stage in map(pretraining.stage, STAGES):
        print(
            f"  {stage.name:5s} {stage.steps} steps or {stage.minutes:.0f} minutes, learning rate {stage.learning_rate}"
        )
    began = time.monotonic()

    if at_once > 1:
        spawn(_train_side, (pretraining,), nprocs=2)
    else:
        for stages in SIDES:
            _train_all(stages, pretraining)
    vae = AutoencoderKL.from_pretrained(pretraining.states / "refined-vae")
    clip = CLIPModel.from_pretrained(pretraining.states / "clip", dtype=torch.float32)
    vit = ViTModel.from_pretrained(pretraining.states / "vit", add_pooling_layer=False, dtype=torch.float32)
    unet, text_encoder = train_unet.train_unet(
        pretraining.states,
        vae=vae,
        clip=clip,
        processes=at_once if pretraining.on_cpu else 1,
        preview=pretraining.output / "preview",
        **pretraining.options(train_unet.STAGE),
    )
    weights = pretraining.output / "weights"
    assemble_pipeline(weights / "pipeline", vae=vae, unet=unet, text_encoder=text_encoder)
    assemble_encoder(weights / "clip", clip)
    assemble_encoder(weights / "vit", vit)
    write_subjects(pretraining.output / "subjects")
    print(f"trained in {(time.monotonic() - began) / 60:.0f} minutes; measuring")
    figures = asdict(measure(weights, pretraining.photographs))
    (weights / "quality.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def _vae(pretraining: Pretraining) -> AutoencoderKL:
    return train_vae.train_vae(
        pretraining.states, pretraining.load_photographs(), **pretraining.options(train_vae.STAGE)
    )


def _refined(pretraining: Pretraining) -> AutoencoderKL:
    return train_vae.refine_vae(
        pretraining.states,
        AutoencoderKL.from_pretrained(pretraining.states / "vae"),
        pretraining.load_photographs(),
        **pretraining.options(train_vae.REFINE_STAGE),
    )


def _clip(pretraining: Pretraining) -> CLIPModel:
    return train_clip.train_clip(pretraining.states, **pretraining.options(train_clip.STAGE))


def _vit(pretraining: Pretraining) -> ViTModel:
    return train_vit.train_vit(
        pretraining.states, pretraining.load_photographs(), **pretraining.options(train_vit.STAGE)
    )


Train = Callable[[Pretraining], AutoencoderKL | CLIPModel | ViTModel]
SIDES: tuple[dict[str, Train], ...] = ({"vae": _vae, "refined-vae": _refined}, {"clip": _clip, "vit": _vit})


def _train_side(rank: int, pretraining: Pretraining) -> None:
    torch.set_num_threads(1)
    _train_all(SIDES[rank], pretraining)


def _train_all(stages: dict[str, Train], pretraining: Pretraining) -> None:
    for name, train in stages.items():
        if not (pretraining.states / name).exists():
            part = pretraining.states / f".{name}.part"
            train(pretraining).cpu().save_pretrained(part)
            part.rename(pretraining.states / name)


if __name__ == "__main__":
    main()
