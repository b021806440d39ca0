"""Train miniature-flow: a denoiser of rectified flow on the autoencoder and the text encoders of the miniature.

    python -m dreambooth.miniature.pretraining.pretrain_flow --output output/miniature-flow

It ends at its number of steps or its minutes, whichever comes first, and the same command goes on where a stopped one
was. `--from` begins with the denoiser of a trained pipeline, at half the learning rates. At the end a Stable Diffusion
3 directory lies in OUTPUT/pipeline; `quality_flow` measures it.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTextModel

from dreambooth.miniature import WEIGHTS_DIR
from dreambooth.miniature.pretraining.assemble import assemble_flow_pipeline
from dreambooth.miniature.pretraining.train_flow import SHIFT, STAGE, train_flow
from dreambooth.quiet import quiet


def main() -> None:
    """Read the command line, train, assemble and measure."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the state and, at the end, the weights go there")
    parser.add_argument("--miniature", type=Path, default=WEIGHTS_DIR, help="the miniature's weights")
    parser.add_argument("--from", dest="begin", type=Path, help="a pipeline whose denoiser to begin with")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--minutes", type=float, default=STAGE.minutes, help="of training")
    parser.add_argument("--threads", type=int, help="of torch; by default as many as it takes")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    began = time.monotonic()
    pipeline = arguments.miniature / "pipeline"
    vae = AutoencoderKL.from_pretrained(pipeline / "vae", torch_dtype=torch.float32)
    transformer, towers = train_flow(
        arguments.output / "states",
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(pipeline / "text_encoder", dtype=torch.float32),
        clip=CLIPModel.from_pretrained(arguments.miniature / "clip", dtype=torch.float32),
        device=torch.device(arguments.device),
        stage=replace(STAGE, minutes=arguments.minutes),
        begin=arguments.begin,
        preview=arguments.output / "preview",
    )
    assemble_flow_pipeline(
        arguments.output / "pipeline", vae=vae.cpu(), transformer=transformer.cpu(), towers=towers.cpu(), shift=SHIFT
    )
    print(f"trained in {(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
