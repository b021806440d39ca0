"""Train a pixel cascade in the format of DeepFloyd IF on the miniature's world, from nothing but its drawings.

    python -m dreambooth.miniature.pretraining.pretrain_cascade --output output/miniature-cascade

Stage I goes first, then stage II. Each ends at its number of steps or its minutes, whichever comes first, and the same
command goes on where a stopped one was. At the end OUTPUT/stage-1 and OUTPUT/stage-2 hold the two pipelines.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from dreambooth.miniature.pretraining import train_cascade
from dreambooth.miniature.pretraining.assemble import assemble_cascade
from dreambooth.quiet import quiet


def main() -> None:
    """Read the command line, train what is missing, assemble."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="states and, at the end, pipelines go there")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--minutes", type=float, help="for all of it; every stage gets its share")
    parser.add_argument("--threads", type=int, help="of torch; by default as many as it takes")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    whole = train_cascade.SMALL_STAGE.minutes + train_cascade.LARGE_STAGE.minutes
    share = 1.0 if arguments.minutes is None else arguments.minutes / whole
    small_stage, large_stage = (
        replace(stage, minutes=stage.minutes * share)
        for stage in (train_cascade.SMALL_STAGE, train_cascade.LARGE_STAGE)
    )
    states, device = arguments.output / "states", torch.device(arguments.device)
    small, t5 = train_cascade.train_small(states, device=device, stage=small_stage)
    large = train_cascade.train_large(states, device=device, stage=large_stage)
    schedulers = (
        train_cascade.scheduler(prediction_type="epsilon"),
        train_cascade.scheduler(prediction_type="v_prediction"),
        train_cascade.noising_scheduler(),
    )
    assemble_cascade(arguments.output, small=small.cpu(), large=large.cpu(), t5=t5.cpu(), schedulers=schedulers)


if __name__ == "__main__":
    main()
