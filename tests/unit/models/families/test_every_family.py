"""What holds for every family, against plain diffusers: arguments, scheduler, gradients, losses and pictures.

On tiny random replicas, so nothing here says anything of quality.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from processor import multiplies_bf16
from recorded_calls import Recorded
from replicas.plain import plain_pipeline, watched
from served import Served
from torch import Tensor

from dreambooth.data.images import to_pixels
from dreambooth.models.families import family_of
from dreambooth.models.process import Diffusion, Process
from dreambooth.sampling.graphs import Graphs
from dreambooth.sampling.sampler import denoiser_of, load_pipeline, sample
from dreambooth.training.model import load_model
from pipelines.plan.run_plan import make_plan

SIDE = 64
SIZE = {"height": SIDE, "width": SIDE}
PROMPTS = ["a photo of sks dog", "a photo of a dog"]
IMAGES = ("sample", "hidden_states")


def moments(process: Process, scheduler: Any) -> Tensor:
    """The moments of a process that a sampler has stopped at, in order."""
    return scheduler.timesteps.long() if isinstance(process, Diffusion) else scheduler.sigmas[:-1]


def image_argument(names: Any) -> str:
    return next(name for name in IMAGES if name in names)


class TestArguments:
    def test_training_passes_the_denoiser_what_the_pipeline_passes(self, base: Path, config: Any, data: Any) -> None:
        family, plain, settings = family_of(base), plain_pipeline(base), config()
        with watched(denoiser_of(plain)) as theirs:
            plain(PROMPTS, num_inference_steps=2, output_type=family.output_type, **SIZE)
        model, batch = load_model(base, settings), data(settings).batch(range(1))
        assert model.training
        stops = moments(model.process, plain.scheduler)
        assert len(stops) == len(theirs)
        for stop, call in zip(stops, theirs, strict=True):
            with watched(model.denoiser) as ours, torch.no_grad():
                model(*batch._replace(timesteps=stop.expand(2)))
            self.compare(ours[0], call)

    def compare(self, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
        """Names, shapes, dtypes, and but for the noisy image values; a pipeline with guidance has no text first."""
        assert set(ours) == set(theirs)
        for name, mine in ours.items():
            other = theirs[name]
            if other.ndim == 0:  # one timestep for all, of the dtype that the sampler counts in
                other = other.to(mine.dtype).expand(len(mine))
            elif len(other) == 2 * len(mine):
                other = other[-len(mine) :]
            assert (name, mine.shape, mine.dtype) == (name, other.shape, other.dtype)
            # Guidance is an input of a distilled model, and not the same in training (`flux.py`).
            assert name in (*IMAGES, "guidance") or torch.equal(mine, other), name


class TestProcess:
    @pytest.mark.parametrize("own", [False, True], ids=["scheduler-of-the-repository", "sampler-of-the-family"])
    def test_a_denoiser_that_knows_x0_samples_it(
        self, base: Path, config: Any, data: Any, picture: Any, own: bool
    ) -> None:
        family, plain = family_of(base), plain_pipeline(base)
        if own:
            plain.scheduler = load_pipeline(base).scheduler
        batch = data(config()).batch(range(1))
        with torch.no_grad():
            x0, _ = family.encode_images(getattr(plain, "vae", None), to_pixels([picture]))
            text = family.encode_text(load_model(base, config()).text_encoders, batch.text)
        process = family.process(base, tuple(x0.shape[1:]))
        denoiser = denoiser_of(plain)
        noises: list[Tensor] = []

        def answer(call: dict[str, Tensor]) -> Tensor:
            """The training target for the noise that is in x_t, in the shape of the denoiser's output."""
            place = image_argument(call)
            x_t = family.prediction(call[place], x0)
            stop = moments(process, plain.scheduler)[len(noises) % len(plain.scheduler.timesteps)].expand(len(x_t))
            known = x0.expand_as(x_t)
            noises.append(self.noise(process, x_t, known, stop))
            target = process.target(known, noises[-1], stop)
            packed: Tensor = family.arguments(denoiser.config, target, stop, text, batch.conditions)[place]
            missing = denoiser.config.get("out_channels") or packed.shape[1]
            return torch.cat([packed, torch.zeros_like(packed)], 1) if missing == 2 * packed.shape[1] else packed

        with watched(denoiser, answer):
            found = plain(PROMPTS[0], num_inference_steps=10, output_type=family.output_type, **SIZE).images
        expected = x0
        if not own and plain.scheduler.config.get("set_alpha_to_one") is False:  # it ends at the first timestep
            expected = process.noisy(x0, noises[0][:1], torch.zeros(1, dtype=torch.long))
        torch.testing.assert_close(family.prediction(found, x0), expected, atol=2e-5, rtol=0)
        with watched(denoiser, answer):
            pixels = plain(PROMPTS[0], num_inference_steps=10, output_type="pt", **SIZE).images
        if expected is x0:
            torch.testing.assert_close(pixels, self.decoded(plain, expected), atol=1e-4, rtol=0)

    def noise(self, process: Process, x_t: Tensor, x0: Tensor, stop: Tensor) -> Tensor:
        none, one = torch.zeros_like(x0), torch.ones_like(x0)
        return (x_t - process.noisy(x0, none, stop)) / process.noisy(none, one, stop)

    def decoded(self, plain: Any, x0: Tensor) -> Tensor:
        if getattr(plain, "vae", None) is None:
            return x0  # as a pipeline of pixels gives them
        settings = plain.vae.config
        with torch.no_grad():
            pixels = plain.vae.decode(x0 / settings.scaling_factor + (settings.shift_factor or 0)).sample
        return (pixels / 2 + 0.5).clamp(0, 1)


class TestTraining:
    def test_every_parameter_gets_a_gradient_but_the_listed_ones(self, base: Path, config: Any, data: Any) -> None:
        settings = config("train.text_encoders=all")
        model = load_model(base, settings).requires_grad_(True)
        family, prepared = model.family, data(settings)
        assert list(model.text_encoders) == [part.folder for part in family.text_encoders(base)]
        for pair in range(3):
            model(*prepared.batch(range(pair, pair + 1))).total.backward()
        found = {name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()}
        owners = {"denoiser": model.denoiser, **model.text_encoders}
        listed = {f"{owner}.{name}" for owner, part in owners.items() for name in family.without_gradient(owner, part)}
        assert found == listed
        frozen = {name for name, each in load_model(base, settings).named_parameters() if not each.requires_grad}
        kept = {f"{folder}.{name}" for folder in model.text_encoders for name in family.kept(base, folder)}
        assert frozen == listed | kept

    def test_a_mask_weighs_positions_of_the_instance_half_alone(self, base: Path, config: Any, data: Any) -> None:
        model, batch = load_model(base, config()).eval(), data(config()).batch(range(2))
        corner = torch.zeros(2, 1, *batch.latents.shape[-2:])
        corner[..., :2, :2] = 2
        with torch.no_grad():
            whole, first, second = (model(*batch._replace(mask=mask)) for mask in (None, corner, 2 - corner))
        torch.testing.assert_close((first.instance + second.instance) / 2, whole.instance)
        assert first.instance < 0.5 * whole.instance
        assert first.prior == second.prior == whole.prior

    def test_gradients_are_the_same_with_recomputed_activations(self, base: Path, config: Any, data: Any) -> None:
        found = []
        for recomputed in ("false", "true"):
            settings = config("train.text_encoders=all", f"train.gradient_checkpointing={recomputed}")
            model = load_model(base, settings)
            model(*data(settings).batch(range(1))).total.backward()
            found.append({name: each.grad for name, each in model.named_parameters() if each.requires_grad})
        assert model.denoiser.is_gradient_checkpointing
        assert all(text_encoder.is_activation_checkpointing for text_encoder in model.text_encoders.values())
        torch.testing.assert_close(found[0], found[1])

    def test_losses_are_those_of_a_plain_reimplementation(self, base: Path, config: Any, data: Any) -> None:
        settings = config("prior.prior_loss_weight=0.7", "train.text_encoders=none")
        model, batch = load_model(base, settings), data(settings).batch(range(3))
        assert not set(batch.timesteps[:3].tolist()) & set(batch.timesteps[3:].tolist())
        x0, noise, t = batch.latents, batch.noise, batch.timesteps
        if isinstance(model.process, Diffusion):
            scheduler = DDPMScheduler.from_config(plain_pipeline(base).scheduler.config)
            noisy = scheduler.add_noise(x0, noise, t)
            velocity = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(x0, noise, t) if velocity else noise
        else:
            noisy = torch.stack([torch.lerp(x0[row], noise[row], t[row]) for row in range(6)])
            target = noise - x0
        text = model.family.join(batch.text)
        with torch.no_grad():
            losses = model(*batch)
            model_pred = model.family.denoise(model.denoiser, noisy, t, text, batch.conditions)
        instance, prior = (float(torch.nn.functional.mse_loss(model_pred[half], target[half])) for half in HALVES)
        expected = [instance + 0.7 * prior, instance, prior]
        assert [float(loss) for loss in losses] == pytest.approx(expected, rel=1e-5)


HALVES = (slice(0, 3), slice(3, 6))


def furthest(pictures: Any, others: Any) -> int:
    """The largest difference of any pixel, of 255."""
    pairs = zip(pictures, others, strict=True)
    return max(abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() for one, other in pairs)


def test_keys_of_pictures_name_the_sampler_that_draws_them(base: Path, config: Any) -> None:
    made = make_plan(config("evaluation.protocol=own", "evaluation.bank=miniature"))
    assert made.prior is not None
    assert made.protocol is not None
    sampler = type(load_pipeline(base).scheduler).__name__
    assert family_of(base).sampler == sampler
    name = "flow-matching euler" if sampler.startswith("FlowMatch") else "dpm-solver++"
    sets = (*made.protocol.base_sets, *made.protocol.fine_tuned_sets)
    assert {made.prior.sampler, *(pictures.sampler for pictures in sets)} == {name}


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_pictures_are_those_of_the_plain_pipeline(base: Path, guidance_scale: float) -> None:
    family, pipeline, plain = family_of(base), load_pipeline(base), plain_pipeline(base)
    plain.scheduler = copy.deepcopy(pipeline.scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    arguments = family.call_arguments(guidance_scale)
    expected = plain(PROMPTS, generator=generators, num_inference_steps=3, **SIZE, **arguments).images
    found = sample(
        pipeline, PROMPTS, [3, 4], num_inference_steps=3, guidance_scale=guidance_scale, dtype=torch.float32, **SIZE
    )
    assert furthest(found, expected) <= 1
    assert furthest(found[:1], found[1:]) > 1


def test_pictures_from_captured_steps_are_the_same_to_the_last_bit(base: Path) -> None:
    """With steps enough for the warm-up, a capture and replays, and another text after the first."""
    pipeline, graphs = load_pipeline(base), Graphs("cpu", replayed=Recorded)
    settings: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 4.0, "dtype": torch.float32, **SIZE}
    for prompt in PROMPTS:
        [plain] = sample(pipeline, [prompt], [3], **settings)
        [found] = sample(pipeline, [prompt], [3], graphs=graphs, **settings)
        assert found.tobytes() == plain.tobytes()
    assert graphs.captures == 1


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # older versions know no other name
def test_pictures_are_those_of_the_model_that_mlflow_serves(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multiplies_bf16(monkeypatch, False)
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, **SIZE}
    found = Served(base).pictures(PROMPTS, seed=3, **settings)
    assert furthest(found, sample(load_pipeline(base), PROMPTS, [3, 4], dtype=torch.float32, **settings)) <= 1
