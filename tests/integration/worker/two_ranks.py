"""One of two processes that train a tiny model with every engine in turn; started by test_engines.py.

    RANK=0 WORLD_SIZE=2 ... python two_ranks.py BASE_MODEL OUTPUT
    RANK=0 WORLD_SIZE=2 ... python two_ranks.py BASE_MODEL OUTPUT adamw8bit
    RANK=0 WORLD_SIZE=1 ... python two_ranks.py BASE_MODEL OUTPUT START END

Rank 0 writes OUTPUT/<case>.pt: the curve and the exported weights of an uninterrupted run, and of most cases the same
once more after going on from a checkpoint; and OUTPUT/diverging.pt: what every rank and engine says when numbers stop
being finite on one rank. With adamw8bit it runs that case alone, which needs torchao. With START and END it goes on
from the checkpoint at START, whoever wrote it, to END, leaves one there, and writes OUTPUT/<case>-to-END.pt.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from dreambooth.config.settings import DreamBoothConfig, ZeroConfig, load_config
from dreambooth.data.batches import Batch, ImageSet, TrainingData
from dreambooth.data.latents import LatentCache
from dreambooth.errors import Diverged
from dreambooth.models.families import family_of
from dreambooth.quiet import quiet
from dreambooth.training.checkpoint_files import save_files
from dreambooth.training.engine import Engine, TorchEngine
from dreambooth.training.loop import StepMetrics, fit
from dreambooth.training.model import load_model
from dreambooth.training.snapshot import Snapshot
from pipelines.worker.behind import Behind

STEPS, CHECKPOINT = 50, 40
"""Steps of the long runs, and of their checkpoint."""
POISONED = 4
"""The step at which one rank's numbers stop being finite."""
FEW_STEPS, FEW_CHECKPOINT = 6, 3
"""Steps of the runs with accumulation, and of their checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One engine, and whether it trains long or a few steps with accumulation. `stage` None means TorchEngine.

    With ZeRO-3 each rank reads its slices of the weights, unless the model is loaded `whole` before. With `buckets`
    instance images have two sizes, with `blocks` each of the denoiser's is gathered at once. `bf16` weights have fp32
    masters, and products in bf16. Optimizers other than AdamW are TorchEngine's alone.
    """

    stage: int | None
    accumulates: bool = False
    offload: bool = False
    offload_parameters: bool = False
    whole: bool = False
    blocks: bool = False
    buckets: bool = False
    bf16: bool = False
    optimizer: str = "adamw"

    @property
    def resumes(self) -> bool:
        """Whether it goes on from a checkpoint, too. Others have a long run of their engine that does.

        Of the short runs with bf16 weights, which take a CPU long, the one that offloads everything does.
        """
        further = self.offload or self.buckets or self.optimizer != "adamw"
        return not self.accumulates or self.offload_parameters or (further and not self.bf16)

    @property
    def name(self) -> str:
        """Its file."""
        offload = "-offload-all" if self.offload_parameters else "-offload" if self.offload else ""
        offload += "-whole" if self.whole else "-blocks" if self.blocks else ""
        offload += "-bf16" if self.bf16 else ""
        engine = "torch" if self.stage is None else f"zero{self.stage}{offload}"
        engine += "" if self.optimizer == "adamw" else f"-{self.optimizer}"
        buckets = "-buckets" if self.buckets else ""
        return f"{engine}{buckets}-accumulation" if self.accumulates else engine


STAGES: tuple[int | None, ...] = (None, 0, 1, 2, 3)
CASES = [Case(stage=stage, accumulates=accumulates) for accumulates in (False, True) for stage in STAGES]
CASES += [Case(stage=stage, accumulates=True, offload=True) for stage in (1, 2, 3)]
CASES += [Case(stage=3, accumulates=True, offload=True, offload_parameters=True)]
CASES += [Case(stage=3, accumulates=True, whole=True)]
CASES += [Case(stage=3, accumulates=True, blocks=True)]
CASES += [Case(stage=stage, accumulates=True, buckets=True) for stage in (2, 3)]
CASES += [Case(stage=None, accumulates=True, optimizer="adafactor")]
EIGHT_BIT = Case(stage=None, accumulates=True, optimizer="adamw8bit")


def configuration(
    base: Path, *, accumulation: int, accumulates: bool, ema_decay: float | None = 0.95, optimizer: str = "adamw"
) -> DreamBoothConfig:
    """The settings of a long run, with a moving average, or of a short one with accumulation, without."""
    steps = FEW_STEPS if accumulates else STEPS
    train = {
        "max_train_steps": steps,
        "optimizer": optimizer,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-3,
        "text_encoder_learning_rate": 1e-4,
        "identifier_learning_rate": 1e-2,
        "lr_scheduler": "linear" if accumulates else "constant",
        "lr_warmup_steps": 4,
        "max_grad_norm": 0.25,
        "min_snr_gamma": 5.0,
        "ema_decay": None if accumulates else ema_decay,
    }
    subject = {"name": "rex", "class_noun": "dog", "identifier": "tfz", "instance_images": "photos"}
    return load_config({"base_model": str(base), "subject": subject, "train": train})


def training_data(base: Path, *, buckets: bool = False) -> TrainingData:
    """Random latents with the prompts of a subject and its class; with `buckets` some aren't square."""
    rng = torch.Generator().manual_seed(0)
    family = family_of(base)
    ids = family.tokenize(base, ["a photo of tfz dog", "a photo of a dog"])["text_encoder.input_ids"]

    def images(count: int, text: torch.Tensor, height: int = 16, width: int = 16) -> ImageSet:
        shape = count, 4, height, width
        mean, std = torch.randn(shape, generator=rng), torch.rand(shape, generator=rng) * 0.1
        return ImageSet(latents=LatentCache(mean=mean, std=std), text={"text_encoder.input_ids": text})

    return TrainingData(
        family=family,
        process=family.process(base, (4, 16, 16)),
        instance=images(5, ids[:1]),
        class_=images(8, ids[1:]),
        other_sizes=(images(3, ids[:1], 12, 20),) if buckets else (),
        seed=3,
    )


def curve_of(
    engine: Engine,
    data: TrainingData,
    config: DreamBoothConfig,
    *,
    start: int = 0,
    after: Callable[[int], None] = lambda step: None,
) -> list[dict[str, float]]:
    """Train, and give the metrics of every step but those of speed."""
    curve: list[dict[str, float]] = []

    def on_step(step: int, metrics: StepMetrics | None) -> None:
        assert metrics is not None
        curve.append({name: value for name, value in metrics.as_dict().items() if name != "images_per_second"})
        after(step)

    fit(engine, data, config.train, start=start, on_step=on_step)
    return curve


def engine_of(base: Path, config: DreamBoothConfig, case: Case, device: str = "cpu", *, autocast: bool = False) -> Any:
    """An engine of a case, with the base model."""
    model = load_model(base, config, autocast=autocast or case.bf16, whole=case.whole or case.stage != 3)
    if case.stage is None:
        return TorchEngine(model, config.train, device)
    from pipelines.worker import deepspeed_engine

    zero = ZeroConfig(
        stage=case.stage,
        offload_optimizer=case.offload,
        offload_parameters=case.offload_parameters,
        weights="bf16" if case.bf16 else "fp32",
        gather_blocks=case.blocks,
    )
    if case.blocks or case.buckets or not case.accumulates:
        # By default ZeRO-3 leaves parameters of up to 100,000 values whole, and here that is all of them.
        plain = deepspeed_engine.deepspeed_config

        def partitioned(*args: Any, **options: Any) -> dict[str, Any]:
            config = plain(*args, **options)
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            return config

        deepspeed_engine.deepspeed_config = partitioned
        try:
            return deepspeed_engine.DeepSpeedEngine(model, config.train, zero, device)
        finally:
            deepspeed_engine.deepspeed_config = plain
    return deepspeed_engine.DeepSpeedEngine(model, config.train, zero, device)


def _run(base: Path, output: Path, case: Case) -> None:
    config = configuration(
        base,
        accumulation=2 if case.accumulates else 1,
        accumulates=case.accumulates,
        optimizer=case.optimizer,
    )
    data = training_data(base, buckets=case.buckets)
    kept = FEW_CHECKPOINT if case.accumulates else CHECKPOINT
    checkpoint = output / f"{case.name}-checkpoint"
    checkpoint.mkdir(exist_ok=True)
    engine = engine_of(base, config, case)
    written: list[Behind] = []

    def after(step: int) -> None:
        if step == 1:
            engine.reserve_snapshot()
        elif step == kept:
            written.append(Behind(partial(write_late, engine.snapshot(), checkpoint)))

    try:
        curve = curve_of(engine, data, config, after=after)
        for each in written:
            each.result()
        state = engine.state_dict()
        result = {"curve": curve, "state": state, "again": engine.state_dict(), "kept_by_others": 0}
        result["last"] = engine.state_dict(averaged=False)
        counts = [0, 0]
        dist.all_gather_object(counts, len(state))
        result["kept_by_others"] = sum(counts[1:])
    finally:
        _close(engine)
    if case.resumes:
        dist.barrier()
        resumed = engine_of(base, config, case)
        try:
            resumed.load(checkpoint)
            result["resumed_curve"] = curve_of(resumed, data, config, start=kept)
            result["resumed_state"] = resumed.state_dict()
        finally:
            _close(resumed)
    if engine.rank == 0:
        torch.save(result, output / f"{case.name}.pt")


def write_late(snapshot: Snapshot, folder: Path) -> None:
    """Make a snapshot so late that the engine would have gone on without it."""
    time.sleep(0.2)
    save_files(snapshot.make(), folder)


class _Poisoned:
    """Training data whose batches are no numbers from a step on."""

    class_ = None
    runs_text_encoders = True

    def __init__(self, data: TrainingData, step: int) -> None:
        self._data, self._left = data, step

    def batch(self, pairs: Any) -> Batch:
        self._left -= 1
        batch = self._data.batch(pairs)
        return batch if self._left > 0 else batch._replace(latents=batch.latents * float("nan"))


def _said(function: Callable[[], Any]) -> str:
    try:
        function()
    except Diverged as error:
        return str(error)
    return "nothing"


def _run_diverging(base: Path, checkpoint: Path, case: Case, *, autocast: bool) -> list[dict[str, Any]]:
    """What every rank says of a loss that is no number on rank 1 at POISONED, and of a moment there that isn't finite.

    Metrics would come long after.
    """
    config = configuration(base, accumulation=1, accumulates=False)
    config = config.model_copy(update={"train": config.train.model_copy(update={"log_every": 40})})
    engine = engine_of(base, config, case, autocast=autocast)
    steps: list[int] = []
    says: dict[str, Any] = {"steps": steps}
    try:
        data = training_data(base)
        fit(engine, data, config.train.model_copy(update={"max_train_steps": 1}))
        moments = [moment for state in moments_of(engine) for moment in state.values() if moment.ndim]
        kept = moments[-1].clone()
        if engine.rank == 1:
            moments[-1].view(-1)[0] = float("inf")
        says["moment"] = [_said(engine.state_dict), _said(lambda: engine.save(checkpoint))]
        says["snapshot"] = _said(engine.snapshot().make)
        moments[-1].copy_(kept)
        says["healthy"] = _said(engine.state_dict)
        poisoned: Any = _Poisoned(data, POISONED - 1) if engine.rank == 1 else data
        says["fit"] = _said(
            lambda: fit(engine, poisoned, config.train, start=1, on_step=lambda step, _: steps.append(step))
        )
        says["after"] = [_said(engine.state_dict), _said(engine.snapshot)]
    finally:
        _close(engine)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, says)
    return everyone


def moments_of(engine: Any) -> Any:
    """The states of this rank's optimizer."""
    if isinstance(engine, TorchEngine):
        return engine.optimizer.state.values()
    optimizer = engine._engine.optimizer
    return (optimizer.optimizer if engine.stage else optimizer).state.values()


def _run_part(base: Path, output: Path, case: Case, start: int, end: int) -> None:
    """Steps of the long run, its global batch divided over the ranks that there are now."""
    config = configuration(base, accumulation=2 // dist.get_world_size(), accumulates=False, ema_decay=None)
    shorter = config.model_copy(update={"train": config.train.model_copy(update={"max_train_steps": end})})
    engine = engine_of(base, config, case)
    try:
        if start:
            engine.load(output / f"{case.name}-at-{start}")
        curve = curve_of(engine, training_data(base), shorter, start=start)
        (output / f"{case.name}-at-{end}").mkdir(exist_ok=True)
        engine.save(output / f"{case.name}-at-{end}")
        state = engine.state_dict()
    finally:
        _close(engine)
    if engine.rank == 0:
        torch.save({"curve": curve, "state": state}, output / f"{case.name}-to-{end}.pt")


def _close(engine: Any) -> None:
    if not isinstance(engine, TorchEngine):
        engine.close()


if __name__ == "__main__":
    quiet()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    base_model, results, part = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    if part == [EIGHT_BIT.optimizer]:
        _run(base_model, results, EIGHT_BIT)
    elif part:
        for each in CASES[: len(STAGES)]:
            _run_part(base_model, results, each, *map(int, part))
    else:
        for each in CASES:
            _run(base_model, results, each)
        diverging = {
            (each.name, autocast): _run_diverging(base_model, results, each, autocast=autocast)
            for each in (*CASES[: len(STAGES)], Case(stage=2, accumulates=True, offload=True))
            for autocast in (False, True)
        }
        if dist.get_rank() == 0:
            torch.save(diverging, results / "diverging.pt")
    dist.destroy_process_group()
