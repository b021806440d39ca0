"""FLUX.1 and PixArt-Sigma are trained on what the plain diffusers pipelines give their denoisers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flux_and_pixart_runs import PROMPTS, SIDE, STEPS, config_of, plain_arguments, plain_pipeline, t5
from replicas import built
from torch import Tensor

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.data.batches import TrainingData
from dreambooth.data.images import InstanceImage
from dreambooth.data.inspection import inspect_addresses
from dreambooth.data.prepare import prepare_data
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.families import Tensors, family_of
from dreambooth.models.process import Diffusion, RectifiedFlow
from dreambooth.sampling.sampler import load_pipeline
from dreambooth.training.model import DreamBoothModel, load_model


class Spy:
    """Keeps what a denoiser's forward is called with, apart from what is None."""

    def __init__(self, denoiser: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        self._forward = denoiser.forward
        denoiser.forward = self

    def __call__(self, *positional: Any, **named: Any) -> Any:
        given = dict(zip(("hidden_states",), positional, strict=False)) | named
        kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
        self.calls.append({name: value for name, value in kept.items() if value is not None})
        return self._forward(*positional, **named)


def text_of(model: DreamBoothModel, base: Path, prompts: list[str]) -> Tensors:
    """Tokens for text encoders that are trained, and states from those that are frozen."""
    family, tokens = model.family, model.family.tokenize(base, prompts)
    text = {name: one for name, one in tokens.items() if name.partition(".")[0] in model.text_encoders}
    for part in family.text_encoders(base):
        if part.folder not in model.text_encoders:
            with torch.no_grad():
                text |= family.encode_with(part.folder, family.load(base, part.folder).eval(), tokens)
    return text


@dataclass(frozen=True)
class Given:
    """A process whose noisy x0 is this."""

    x_t: Tensor

    def noisy(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.x_t

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise

    def weight(self, timesteps: Tensor, *, min_snr_gamma: float | None) -> None:
        return None


def test_training_passes_the_arguments_of_the_pipeline(base: Path) -> None:
    pipeline = plain_pipeline(base)
    spy = Spy(pipeline.transformer)
    pipeline(
        PROMPTS,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **plain_arguments(pipeline),
    )
    model = load_model(base, config_of(base)).eval()
    ours = Spy(model.denoiser)
    for call in spy.calls:
        x_t = call["hidden_states"]
        x_t = pipeline._unpack_latents(x_t, SIDE, SIDE, 8) if x_t.ndim == 3 else x_t
        model.process = Given(x_t)
        with torch.no_grad():
            model(x_t, x_t, call["timestep"].reshape(-1).expand(2), text_of(model, base, PROMPTS), {})
    assert len(spy.calls) == len(ours.calls) == STEPS
    for theirs, given in zip(spy.calls, ours.calls, strict=True):
        for both in (theirs, given):
            both.pop("joint_attention_kwargs", None)
            both.pop("return_dict")
        assert given.keys() == theirs.keys()
        for name, value in theirs.items():
            if not isinstance(value, Tensor):
                assert given[name] == value, name
                continue
            assert (given[name].dtype, given[name].shape) == (value.dtype, value.shape), name
            assert torch.equal(given[name], value), name


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[InstanceImage, ...]:
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for index in range(3):
        noise = np.random.default_rng(index).integers(0, 256, (72, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    return inspect_addresses((str(folder),), resolution=SIDE, max_pixels=10**6).images


def data_of(base: Path, photographs: tuple[InstanceImage, ...], config: DreamBoothConfig) -> TrainingData:
    from PIL import Image

    drawn = [Image.new("RGB", (SIDE, SIDE), (index * 40, 90, 200)) for index in range(4)]
    return prepare_data(base, config, photographs, drawn)


def noise_of(process: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Noisy x0 and the target, written down anew."""
    x0, noise, moments = batch.latents, batch.noise, batch.timesteps
    if isinstance(process, Diffusion):
        betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
        abar = torch.cumprod(1 - betas, 0)[moments].reshape(-1, 1, 1, 1)
        return (abar.sqrt() * x0 + (1 - abar).sqrt() * noise).float(), noise
    sigma = moments.reshape(-1, 1, 1, 1)
    return x0 + sigma * (noise - x0), noise - x0


def test_losses_equal_a_plain_reimplementation_with_moments_of_their_own(
    base: Path, photographs: tuple[InstanceImage, ...]
) -> None:
    config = config_of(base)
    data, model = data_of(base, photographs, config), load_model(base, config).eval()
    batch, pipeline = data.batch(range(2)), plain_pipeline(base)
    assert len(set(batch.timesteps.tolist())) == 4
    noisy, target = noise_of(data.process, batch)
    prompts = ["a photo of xwz dog"] * 2 + ["a photo of a dog"] * 2
    with torch.no_grad():
        losses = model(*batch)
        if "Flux" in type(pipeline).__name__:
            states, pooled, text_ids = pipeline.encode_prompt(prompts)
            ids = pipeline._prepare_latent_image_ids(4, 4, 4, "cpu", torch.float32)
            output = pipeline.transformer(
                hidden_states=pipeline._pack_latents(noisy, *noisy.shape),
                timestep=batch.timesteps,
                guidance=torch.ones(4) if pipeline.transformer.config.guidance_embeds else None,
                pooled_projections=pooled,
                encoder_hidden_states=states,
                txt_ids=text_ids,
                img_ids=ids,
            ).sample
            model_pred = pipeline._unpack_latents(output, SIDE, SIDE, 8)
        else:
            states, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
            model_pred = pipeline.transformer(
                noisy,
                timestep=batch.timesteps,
                encoder_hidden_states=states,
                encoder_attention_mask=mask,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample[:, :4]
    instance, prior = ((model_pred - target) ** 2).chunk(2)
    torch.testing.assert_close(losses.instance, instance.mean())
    torch.testing.assert_close(losses.prior, prior.mean())
    torch.testing.assert_close(losses.total, instance.mean() + prior.mean())


@pytest.mark.parametrize("text_encoders", ["all", "auto"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trained_parameter_gets_a_gradient(
    base: Path, photographs: tuple[InstanceImage, ...], text_encoders: str, checkpointing: bool
) -> None:
    config = config_of(base, text_encoders=text_encoders, gradient_checkpointing=checkpointing)
    model = load_model(base, config)
    batch = data_of(base, photographs, config).batch(range(2))
    first, second = model(*batch).total, model(*batch).total
    assert first == second, "T5's dropout"
    first.backward()
    present = {part.folder for part in family_of(base).text_encoders(base)}
    assert set(model.text_encoders) == (present if text_encoders == "all" else present - {"text_encoder_2"} - t5(base))
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


class TestShift:
    @pytest.mark.parametrize("side", [64, 512, 1024])
    def test_the_draw_is_shifted_as_the_samplers_sigmas(self, dev: Path, side: int) -> None:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        process = family_of(dev).process(dev, (16, side // 8, side // 8))
        scheduler = load_pipeline(dev).scheduler
        scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.1], mu=calculate_shift((side // 16) ** 2))
        shift = process.shift  # type: ignore[attr-defined]
        expected = torch.tensor([shift * s / (1 + (shift - 1) * s) for s in (0.9, 0.5, 0.1)])
        torch.testing.assert_close(scheduler.sigmas[:3], expected)

    def test_schnell_has_none(self, tmp_path: Path) -> None:
        base = built("flux-schnell", tmp_path / "flux-schnell")
        assert family_of(base).process(base, (16, 128, 128)) == RectifiedFlow(shift=1.0)
        settings = resolve_base_model(str(base)).settings
        assert "distilled" in str(settings.warning)
        assert settings.family.defaults_of(settings).num_inference_steps == 4
