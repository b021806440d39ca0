"""One of the processes that train a tiny model with bf16 weights; started by test_bf16_weights.py.

    RANK=0 WORLD_SIZE=2 ... python bf16_ranks.py BASE_MODEL OUTPUT
    RANK=0 WORLD_SIZE=1 ... python bf16_ranks.py BASE_MODEL OUTPUT more

Rank 0 of two writes OUTPUT/<case>.pt as two_ranks.py does, and OUTPUT/measured.pt: by case the weights right after the
engine is made and the dtypes that it computes with, and the bytes of a step's collectives; weights after small updates;
and what every rank says of numbers that aren't finite. With `more` one rank goes on from where two have been.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import two_ranks
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from two_ranks import Case, curve_of, engine_of

from dreambooth.quiet import quiet

LONG = [Case(stage=stage, bf16=True) for stage in (1, 2, 3)]
SHORT = [Case(stage=stage, bf16=True, accumulates=True, offload=True) for stage in (1, 2)]
SHORT += [
    Case(stage=3, bf16=True, accumulates=True, **how)
    for how in ({"offload": True, "offload_parameters": True}, {"whole": True}, {"blocks": True}, {"buckets": True})
]
TORCH = Case(stage=None, accumulates=True)
STEPS, CHECKPOINT, FEW_STEPS, FEW_CHECKPOINT = 8, 5, 5, 3
SMALL_RATE, SMALL_STEPS = 5e-6, 8
PART, END = 4, 8
"""Where two ranks end, and where one does that goes on."""


class Collectives(TorchDispatchMode):
    """Bytes of what collectives give to this rank, by their names."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and args:
            given = sum(one.nbytes for one in torch.utils._pytree.tree_leaves(args[0]) if isinstance(one, torch.Tensor))
            name = func._schema.name.removeprefix("c10d::")
            self.bytes[name] = self.bytes.get(name, 0) + given
        return func(*args, **(kwargs or {}))


def _start(base: Path, case: Case) -> dict[str, Any]:
    engine = engine_of(base, two_ranks.configuration(base, accumulation=1, accumulates=True), case)
    try:
        dtypes = sorted({str(parameter.dtype) for parameter in engine._engine.module.parameters()})
        return {"state": dict(engine.state_dict()), "dtypes": dtypes}
    finally:
        engine.close()


def _sent(base: Path, case: Case) -> dict[str, int]:
    """Bytes of the second step, when ZeRO-3 knows the order of parameters."""
    config = two_ranks.configuration(base, accumulation=1, accumulates=False, ema_decay=None)
    engine, data = engine_of(base, config, case, autocast=True), two_ranks.training_data(base)
    try:
        for pair in range(2):
            with Collectives() as collectives:
                engine.backward(engine(data.batch(range(pair, pair + 1))).total)
                engine.step()
        return collectives.bytes
    finally:
        engine.close()


def _small(base: Path, case: Case) -> dict[str, Any]:
    """Weights after a few steps of a small learning rate."""
    config = two_ranks.configuration(base, accumulation=1, accumulates=True)
    rates = {"learning_rate": SMALL_RATE, "text_encoder_learning_rate": SMALL_RATE, "identifier_learning_rate": 1e-4}
    few = {"max_train_steps": SMALL_STEPS, "lr_scheduler": "constant", "lr_warmup_steps": 0}
    config = config.model_copy(update={"train": config.train.model_copy(update=rates | few)})
    engine = engine_of(base, config, case, autocast=True)
    try:
        curve = curve_of(engine, two_ranks.training_data(base), config)
        return {"curve": curve, "state": dict(engine.state_dict())}
    finally:
        if case.stage is not None:
            engine.close()


def _run(base: Path, output: Path) -> None:
    measured = {
        "start": {case.name: _start(base, case) for case in (*LONG, *SHORT)},
        "sent": {(stage, bf16): _sent(base, Case(stage=stage, bf16=bf16)) for stage in (1, 2, 3) for bf16 in (0, 1)},
        "small": {case.name: _small(base, case) for case in (TORCH, *LONG)},
        "diverging": {case.name: two_ranks._run_diverging(base, output, case, autocast=True) for case in LONG},
    }
    if dist.get_rank() == 0:
        torch.save(measured, output / "measured.pt")
    for case in (*LONG, *SHORT):
        two_ranks._run(base, output, case)
    for case in LONG:
        two_ranks._run_part(base, output, case, 0, PART)


if __name__ == "__main__":
    quiet()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    two_ranks.STEPS, two_ranks.CHECKPOINT = STEPS, CHECKPOINT
    two_ranks.FEW_STEPS, two_ranks.FEW_CHECKPOINT = FEW_STEPS, FEW_CHECKPOINT
    base_model, results = Path(sys.argv[1]), Path(sys.argv[2])
    if sys.argv[3:]:
        for each in LONG:
            two_ranks._run_part(base_model, results, each, PART, END)
    else:
        _run(base_model, results)
    dist.destroy_process_group()
