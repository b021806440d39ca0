"""Prints by how many bytes a process grows at most while one parameter is updated; started by test_memory.py.

python measure_update.py adafactor '[2048, 512]'
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from dreambooth.config.train import TrainConfig
from dreambooth.models.families.stable_diffusion import StableDiffusion
from dreambooth.models.process import Diffusion
from dreambooth.quiet import quiet
from dreambooth.training.model import DreamBoothModel
from dreambooth.training.optimizer import build_optimizer


def _status(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def _measured(name: str, shape: list[int]) -> int:
    parameter = nn.Parameter(torch.randn(shape))
    model = DreamBoothModel(
        family=StableDiffusion(),
        denoiser=nn.ParameterList([parameter]),
        text_encoders={},
        process=Diffusion(alphas_cumprod=torch.ones(1)),
        prior_loss_weight=1.0,
    )
    optimizer = build_optimizer(model, TrainConfig.model_validate({"optimizer": name}))
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()  # what the first takes for good is there
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    optimizer.step()
    return _status("VmHWM") - before


if __name__ == "__main__":
    quiet()
    print(json.dumps([_measured(*case) for case in json.loads(sys.argv[1])]))
