"""The step that a CUDA device replays as graphs, called on a CPU: TorchEngine's results from tensors that stay put.

A CPU calls the first subject's functions where a device would replay its graphs. That they can be captured is tested in
tests/gpu.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from host_reads import HostReads
from PIL import Image

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.batches import TrainingData
from dreambooth.data.images import find_instance_images
from dreambooth.data.prepare import prepare_data
from dreambooth.errors import Diverged
from dreambooth.training.engine import TorchEngine
from dreambooth.training.graphable import why_not_graphed
from dreambooth.training.graphed_engine import FixedStep, GraphedEngine
from dreambooth.training.loop import StepMetrics, fit
from dreambooth.training.model import DreamBoothModel, load_model

STEPS = 50
SUBJECTS = ("sks", "zwx", "xqz")  # each of three tokens
EVERYTHING = (
    "train.learning_rate=3e-4",
    "train.identifier_learning_rate=2e-3",
    "train.lr_warmup_steps=5",
    "train.lr_scheduler=cosine",
    "train.ema_decay=0.95",
    "train.max_grad_norm=0.5",
    "train.min_snr_gamma=5",
)
Curve = list[tuple[float, ...]]


class Subject:
    """A subject's settings and data: photographs of noise, and class images of one colour each."""

    def __init__(self, base: Path, images: Path, identifier: str, *overrides: str) -> None:
        subject = {"name": identifier, "class_noun": "dog", "identifier": identifier, "instance_images": str(images)}
        plain: dict[str, Any] = {"base_model": str(base), "subject": subject, "images": {"resolution": 64}}
        self.config: DreamBoothConfig = load_config(plain, (f"train.max_train_steps={STEPS}", *overrides))
        shade = sum(identifier.encode()) % 256
        class_images = [Image.new("RGB", (64, 64), (index * 60, 90, shade)) for index in range(3)]
        self.data: TrainingData = prepare_data(base, self.config, find_instance_images([str(images)]), class_images)
        self._base = base

    def model(self, *, autocast: bool = False) -> DreamBoothModel:
        return load_model(self._base, self.config, autocast=autocast)

    def train(self, engine: TorchEngine, after: Callable[[int], None] = lambda step: None, start: int = 0) -> Curve:
        """The logged values that are no matter of speed."""
        curve: Curve = []

        def on_step(step: int, metrics: StepMetrics | None) -> None:
            if metrics is not None:
                values = metrics.as_dict()
                del values["images_per_second"]
                curve.append(tuple(values.values()))
            after(step)

        fit(engine, self.data, self.config.train, start=start, on_step=on_step)
        return curve


def assert_same_weights(one: TorchEngine, other: TorchEngine) -> None:
    state, reference = one.state_dict(), other.state_dict()
    assert state.keys() == reference.keys()
    assert [name for name in state if not torch.equal(state[name], reference[name])] == []


@pytest.fixture
def subject(tiny_pipeline: Path, instance_folder: Path) -> Callable[..., Subject]:
    return lambda identifier, *overrides: Subject(tiny_pipeline, instance_folder, identifier, *overrides)


def addresses(engine: TorchEngine) -> list[int]:
    """Addresses of all that a step reads and writes, but gradients."""
    tensors = [*engine.model.parameters(), *engine.model.buffers(), *(engine.ema.averages if engine.ema else ())]
    for parameter in engine.parameters:
        tensors += engine.optimizer.state[parameter].values()
    return [tensor.data_ptr() for tensor in tensors]


def test_three_subjects_in_a_row_have_the_plain_engines_losses_in_one_memory(subject: Callable[..., Subject]) -> None:
    step, engines, places = FixedStep("cpu"), list[GraphedEngine](), set[tuple[int, ...]]()
    gradients = [set[tuple[int | None, ...]]() for _ in SUBJECTS]

    def look(_: int) -> None:
        places.add(tuple(addresses(engines[-1])))
        for engine, seen in zip(engines, gradients, strict=False):
            seen.add(tuple(None if p.grad is None else p.grad.data_ptr() for p in engine.parameters))

    for identifier in SUBJECTS:
        one = subject(identifier, *EVERYTHING)
        plain = TorchEngine(one.model(), one.config.train)
        engines.append(GraphedEngine(one.model(), one.config.train, "cpu", step))
        expected, got = one.train(plain), one.train(engines[-1], look)
        assert len(got) == STEPS
        assert got == expected
        assert_same_weights(engines[-1], plain)
    assert len(places) == 1
    [of_all_subjects] = gradients[0]  # the first one's serve
    none = (None,) * len(of_all_subjects)
    assert gradients[1:] == [{none}, {none}]
    assert sum(place is not None for place in of_all_subjects) > len(none) / 2


FEW = ("train.max_train_steps=6", "train.learning_rate=1e-3", "train.lr_scheduler=linear")


def test_micro_steps_and_casts_to_bf16(subject: Callable[..., Subject]) -> None:
    one = subject("sks", *FEW, "train.gradient_accumulation_steps=2", "train.max_grad_norm=null")
    plain = TorchEngine(one.model(autocast=True), one.config.train)
    engine = GraphedEngine(one.model(autocast=True), one.config.train, "cpu", FixedStep("cpu"))
    assert one.train(engine) == one.train(plain)
    assert_same_weights(engine, plain)


def test_an_identifier_of_other_tokens_takes_new_memory(subject: Callable[..., Subject]) -> None:
    step = FixedStep("cpu")
    for identifier in ("sks", "ohwx"):  # of three tokens and four
        one = subject(identifier, *FEW, "train.identifier_learning_rate=2e-3")
        engine = GraphedEngine(one.model(), one.config.train, "cpu", step)
        assert one.train(engine) == one.train(TorchEngine(one.model(), one.config.train))


def test_a_subject_without_masks_after_one_with(subject: Callable[..., Subject]) -> None:
    one, step, mask = subject("sks", *FEW), FixedStep("cpu"), torch.zeros(1, 1, 16, 16)
    for masked in (False, True, False):
        engine = GraphedEngine(one.model(), one.config.train, "cpu", step)
        plain = TorchEngine(one.model(), one.config.train)
        for pair in range(2):
            batch = one.data.batch(range(pair, pair + 1))
            batch = batch._replace(mask=mask) if masked else batch
            losses = engine(batch)
            engine.backward(losses.total)
            assert torch.equal(losses.instance, plain(batch).instance)
            assert (losses.instance == 0) == masked


@pytest.mark.parametrize("graphed_first", [False, True])
def test_goes_on_from_the_other_engines_checkpoint(
    subject: Callable[..., Subject], tmp_path: Path, graphed_first: bool
) -> None:
    one, used = subject("sks", *FEW, "train.ema_decay=0.9"), FixedStep("cpu")

    def graphed() -> TorchEngine:
        return GraphedEngine(one.model(), one.config.train, "cpu", used)

    def plain() -> TorchEngine:
        return TorchEngine(one.model(), one.config.train)

    before, after = (graphed, plain) if graphed_first else (plain, graphed)
    one.train(graphed())  # what it leaves must not come through
    engine = before()
    whole = one.train(engine, lambda step: engine.save(tmp_path) if step == 2 else None)
    resumed = after()
    resumed.load(tmp_path)
    assert one.train(resumed, start=2) == whole[2:]
    assert_same_weights(resumed, engine)


def test_a_gradient_that_is_not_finite_is_remembered_and_no_checkpoint_written(
    subject: Callable[..., Subject], tmp_path: Path
) -> None:
    one, step = subject("sks", *FEW), FixedStep("cpu")
    engine = GraphedEngine(one.model(), one.config.train, "cpu", step)
    for number in range(4):
        if number == 2:
            with torch.no_grad():
                engine.parameters[0].fill_(torch.nan)
        engine.backward(engine(one.data.batch(range(number, number + 1))).total)
        engine.step()
    assert engine.diverged_at() == 3
    with pytest.raises(Diverged, match="not finite at step 3"):
        engine.save(tmp_path)
    healthy = GraphedEngine(one.model(), one.config.train, "cpu", step)
    assert one.train(healthy) == one.train(TorchEngine(one.model(), one.config.train))


def test_nothing_within_a_step_waits_for_the_host(subject: Callable[..., Subject]) -> None:
    one = subject("sks", *EVERYTHING)
    engine = GraphedEngine(one.model(autocast=True), one.config.train, "cpu", FixedStep("cpu"))
    for number in range(3):
        losses = engine(one.data.batch(range(number, number + 1)))
        with HostReads() as reads:
            engine.backward(losses.total)
            engine.step()
        assert reads.seen == []
    with HostReads() as reads:
        assert engine.grad_norm > 0
    assert reads.seen == ["_local_scalar_dense"]


@pytest.mark.parametrize(
    ("overrides", "device", "workers", "reason"),
    [
        ((), "cuda:0", 1, None),
        (("train.gradient_accumulation_steps=4",), "cuda", 1, None),
        ((), "cpu", 1, "no CUDA device"),
        ((), "cuda", 2, "2 workers"),
        (("train.optimizer=adafactor",), "cuda", 1, "train.optimizer is adafactor"),
        (("train.fused_backward=true", "train.max_grad_norm=null"), "cuda", 1, "train.fused_backward"),
        (("train.gradient_checkpointing=true",), "cuda", 1, "train.gradient_checkpointing"),
    ],
)
def test_what_cannot_be_captured(overrides: tuple[str, ...], device: str, workers: int, reason: str | None) -> None:
    subject = {"name": "rex", "class_noun": "dog", "instance_images": "dog"}
    config = load_config({"subject": subject}, overrides)
    found = why_not_graphed(config.train, device, workers)
    assert found == reason if reason is None else found is not None and reason in found


def test_photographs_of_several_sizes_are_not_captured() -> None:
    config = load_config({"subject": {"name": "rex", "class_noun": "dog", "instance_images": "dog"}})
    assert why_not_graphed(config.train, "cuda", 1, sizes=1) is None
    found = why_not_graphed(config.train, "cuda", 1, sizes=3)
    assert found == "the photographs have 3 sizes (images.aspect_buckets), and a graph has one"
