"""Every family's training stops and goes on, and recomputes activations: the same weights, to the bit.

With photographs of one size and of several.

On tiny random replicas; that the best checkpoint is kept and published is tested in tests/integration/families.
"""

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from host_reads import HostReads
from PIL import Image
from replicas.plain import watched
from torch import Tensor

from dreambooth.models.process import Diffusion
from dreambooth.training.engine import TorchEngine
from dreambooth.training.loop import StepMetrics, fit
from dreambooth.training.model import load_model

NAMES = ["stable-diffusion-xl", "stable-diffusion-3.5", "flux-dev", "pixart-sigma", "deepfloyd-if"]
STEPS, STOP = 3, 1
SETTINGS = (
    "train.text_encoders=all",
    "train.learning_rate=1e-3",
    f"train.max_train_steps={STEPS}",
    "train.lr_scheduler=cosine",
    "train.ema_decay=0.9",
)


class Killed(Exception):
    """The end of a process."""


def weights(engine: TorchEngine) -> dict[str, Tensor]:
    """All tensors of the model, and the moving average, which is exported."""
    average = {f"average.{name}": each for name, each in engine.state_dict().items()}
    return {name: each.clone() for name, each in engine.model.state_dict().items()} | average


@pytest.mark.parametrize("base", NAMES, indirect=True)
def test_stopping_and_recomputing_change_nothing(base: Path, config: Any, data: Any, tmp_path: Path) -> None:
    def train(*, recomputed: bool, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Everything anew, from the checkpoint of step `start` if that isn't 0; killed after a checkpoint at `stop`."""
        settings = config(*SETTINGS, f"train.gradient_checkpointing={str(recomputed).lower()}")
        engine = TorchEngine(load_model(base, settings), settings.train)
        assert engine.model.denoiser.is_gradient_checkpointing is recomputed

        def on_step(step: int, _: StepMetrics | None) -> None:
            if step == stop:
                engine.save(tmp_path)
                raise Killed

        if start:
            engine.load(tmp_path)
        with suppress(Killed):
            fit(engine, data(settings), settings.train, start=start, on_step=on_step)
        return weights(engine)

    whole, part = train(recomputed=True), train(recomputed=True, stop=STOP)
    resumed, plain = train(recomputed=True, start=STOP), train(recomputed=False)
    assert whole.keys() == resumed.keys() == plain.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert [name for name in whole if not torch.equal(whole[name], plain[name])] == []
    assert len([name for name in whole if not torch.equal(whole[name], part[name])]) > len(whole) / 2


@pytest.mark.parametrize("base", [name for name in NAMES if name != "deepfloyd-if"], indirect=True)
def test_photographs_of_two_sizes(base: Path, config: Any, data: Any, picture: Image.Image, tmp_path: Path) -> None:
    """A training of both that stops goes on as if it hadn't, and each half is as large as it is."""
    settings = config(*SETTINGS, "images.aspect_buckets=true", "train.micro_batch_size=2")
    picture.resize((120, 70)).save(tmp_path / "photographs" / "01.png")
    prepared = data(settings)

    def train(start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        engine = TorchEngine(load_model(base, settings), settings.train)
        if start:
            engine.load(tmp_path)
        with watched(engine.model.denoiser) as calls:
            stopping = settings.train.model_copy(update={"max_train_steps": stop or STEPS})
            fit(engine, prepared, stopping, start=start)
        assert len(calls) == 2 * ((stop or STEPS) - start)
        engine.save(tmp_path)
        return weights(engine)

    shapes = [prepared.batch(range(2 * step, 2 * step + 2)).latents.shape for step in range(STEPS)]
    assert len(set(shapes)) == 2
    assert {shape[0] for shape in shapes} == {2}
    whole, _, resumed = train(), train(stop=STOP), train(start=STOP)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


@pytest.mark.parametrize("base", NAMES, indirect=True)
def test_halves_apart_are_halves_together(base: Path, config: Any, data: Any) -> None:
    """Losses and gradients of two passes are those of one, but for rounding."""
    settings = config("prior.prior_loss_weight=0.3", "train.min_snr_gamma=null")
    model = load_model(base, settings)
    batch = data(settings).batch(range(2))
    instance, class_ = (batch.mapped(lambda _, part, rows=rows: part[rows]) for rows in (slice(0, 2), slice(2, 4)))
    found = []
    for one in (batch, instance._replace(class_half=class_)):
        model.zero_grad()
        losses = model(*one)
        losses.total.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((torch.stack(losses).detach(), gradients))
    (together, expected), (apart, gradients) = found
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-6)
    assert gradients.keys() == expected.keys()
    largest = max(float(each.abs().max()) for each in expected.values())
    for name, each in gradients.items():
        torch.testing.assert_close(each, expected[name], rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("base", NAMES, indirect=True)
def test_no_pass_waits_for_the_host(base: Path, config: Any, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which has shapes alone, so that what lies on the host by mistake is on another device."""
    # A T5 with a mask asks whether all of it is true: trained, it is no part of a captured step.
    settings = config(f"train.text_encoders={'none' if 'pixart' in str(base) else 'all'}")
    model = load_model(base, settings).to("meta")
    on_host, model.process = model.process, model.process.to("meta")
    batch = data(settings).batch(range(1)).to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none on the meta device
    with HostReads() as reads:
        model(*batch).total.backward()
    assert reads.seen == []
    if isinstance(on_host, Diffusion):
        model.process = on_host
        with HostReads() as reads:
            model(*batch)
        assert set(reads.seen) == {"_to_copy"}
