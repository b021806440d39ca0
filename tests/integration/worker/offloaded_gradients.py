"""Print the most gradients that DeepSpeed keeps beside its buckets in a step, in bytes a parameter, as JSON by case.

One rank, with the optimizer in host memory and the settings of gradients as on a GPU.
"""

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}

import torch
from torch import Tensor, nn, optim

from dreambooth.config.settings import ZeroConfig
from dreambooth.config.train import TrainConfig
from pipelines.worker.deepspeed_engine import deepspeed_config, import_deepspeed

_SIDE, _LAYERS = 64, 12


def settings(stage: int, weights: str, micro_steps: int) -> dict[str, Any]:
    zero = ZeroConfig(stage=stage, weights=weights, offload_optimizer=True)
    config = deepspeed_config(TrainConfig(gradient_accumulation_steps=micro_steps), zero, cuda=True)
    config["zero_optimization"] |= {"reduce_bucket_size": 2 * _SIDE**2}
    config["zero_optimization"]["offload_optimizer"]["pin_memory"] = False
    return config


def storages(tensors: list[Tensor | None]) -> dict[int, int]:
    """Bytes by address."""
    found = [each.untyped_storage() for each in tensors if each is not None]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def kept(optimizer: Any, parameters: list[nn.Parameter]) -> int:
    """Bytes of gradients: of each parameter, or of a rank's partition, in which ZeRO-1 and 2 add up bf16 weights'."""
    buffers = [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
    buckets = storages([each for buffer in buffers for each in (buffer if isinstance(buffer, list) else [buffer])])
    groups = (getattr(optimizer, "averaged_gradients", None) or {}).values()
    gradients = [each for p in parameters for each in (p.grad, getattr(p, "grad_accum", None))]
    held = storages([*gradients, *(getattr(group, "flat_partition", None) for group in groups)])
    return sum(size for address, size in held.items() if address not in buckets)


def most_kept(deepspeed: Any, stage: int, weights: str, micro_steps: int) -> float:
    """In the second step."""
    model = nn.Sequential(*[nn.Linear(_SIDE, _SIDE, bias=False) for _ in range(_LAYERS)])
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optim.AdamW(model.parameters()), config=settings(stage, weights, micro_steps)
    )
    parameters, seen = list(engine.module.parameters()), [0]
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda _: seen.append(kept(engine.optimizer, parameters)))
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    for step in range(2):
        for _ in range(micro_steps):
            seen += [kept(engine.optimizer, parameters)] if step else []
            engine.backward(engine(torch.ones(1, _SIDE, dtype=dtype)).float().square().mean())
            seen = [*seen, kept(engine.optimizer, parameters)] if step else [0]
            engine.step()
    engine.destroy()
    return max(seen) / (_LAYERS * _SIDE**2)


deepspeed = import_deepspeed(cuda=False)
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{Path(tempfile.mkdtemp()) / 'store'}", rank=0, world_size=1
)
deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
cases = itertools.product((1, 2, 3), ("fp32", "bf16"), (1, 2))
found = {json.dumps(case): most_kept(deepspeed, *case) for case in cases}
Path(sys.argv[1]).write_text(json.dumps(found))
