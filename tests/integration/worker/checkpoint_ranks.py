"""One of two processes that keep checkpoints together; started by test_checkpoint_ranks.py.

    RANK=0 WORLD_SIZE=2 ... python checkpoint_ranks.py BASE_MODEL OUTPUT CASES

CASES is a JSON list of [name, ZeRO's stage (-1: TorchEngine), the moving average's decay (0: none), address, the step
at which a moment of rank 1 isn't finite (0: none)]. Each
trains three steps from the newest checkpoint at its address, saves after every step, and writes
OUTPUT/<name>-<rank>.json: where it began, what it was warned of, and why it ended before its time.
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from two_ranks import Case, configuration, curve_of, engine_of, moments_of, training_data

from dreambooth.errors import Diverged
from dreambooth.quiet import quiet
from pipelines.storage.faults import StorageFull
from pipelines.worker.checkpoints import StoredCheckpoints

STEPS = 3


def run(base: Path, stage: int, ema: float, uri: str, broken_at: int = 0) -> dict[str, object]:
    """Train, and say how it went."""
    config = configuration(base, accumulation=1, accumulates=False, ema_decay=ema or None)
    config = config.model_copy(update={"train": config.train.model_copy(update={"max_train_steps": STEPS})})
    engine = engine_of(base, config, Case(stage=None if stage < 0 else stage))
    warnings: list[str] = []
    checkpoints = StoredCheckpoints(uri, need_bytes=1_000_000, warn=warnings.append)
    history, full = checkpoints.restore(engine), None
    start = history.step

    def save(step: int) -> None:
        history.step = step
        if step == broken_at and engine.rank == 1:
            next(moment for state in moments_of(engine) for moment in state.values() if moment.ndim).view(-1)[0] = (
                math.inf
            )
        checkpoints.begin(engine, history).result()

    try:
        curve_of(engine, training_data(base), config, start=start, after=save)
    except (StorageFull, Diverged) as error:
        full = str(error)
    if stage >= 0:
        engine.close()
    return {"start": start, "warnings": warnings, "full": full}


if __name__ == "__main__":
    quiet()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    base_model, output = Path(sys.argv[1]), Path(sys.argv[2])
    for name, *case in json.loads(sys.argv[3]):
        result = json.dumps(run(base_model, *case))
        Path(output, f"{name}-{dist.get_rank()}.json").write_text(result)
    dist.destroy_process_group()
