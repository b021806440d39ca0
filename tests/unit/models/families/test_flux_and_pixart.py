"""FLUX.1 and PixArt-Sigma against the plain diffusers pipelines, on tiny random replicas."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processor import multiplies_bf16
from replicas import built
from served import Served
from torch import Tensor

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.batches import TrainingData
from dreambooth.data.images import InstanceImage
from dreambooth.data.inspection import inspect_addresses
from dreambooth.data.prepare import prepare_data
from dreambooth.errors import InputError
from dreambooth.models.base_model import BaseModel, resolve_base_model
from dreambooth.models.delta import rebuild, write_delta
from dreambooth.models.export import export_pipeline, verify_export
from dreambooth.models.families import Tensors, family_of
from dreambooth.models.process import Diffusion, RectifiedFlow
from dreambooth.sampling.sampler import load_pipeline, load_trained, sample
from dreambooth.training.model import DreamBoothModel, load_model

NAMES = ["flux-dev", "flux-schnell", "pixart-sigma"]
PROMPTS = ["a photo of dog", "a cat on the beach"]
SIDE, STEPS = 64, 4


@pytest.fixture(scope="module", params=NAMES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(request.param, tmp_path_factory.mktemp("replica") / request.param)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("flux-dev", tmp_path_factory.mktemp("replica") / "flux-dev")


def config_of(base: Path, **train: Any) -> DreamBoothConfig:
    subject = {"name": "rex", "class_noun": "dog", "identifier": "xwz", "instance_images": "photos"}
    return load_config(
        {"base_model": str(base), "subject": subject, "images": {"resolution": SIDE}, "train": {"seed": 3} | train}
    )


def plain_pipeline(directory: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_arguments(pipeline: Any) -> dict[str, Any]:
    """So that a plain pipeline takes a size that isn't in its list, and prompts as they are."""
    if type(pipeline).__name__ == "PixArtSigmaPipeline":
        return {"use_resolution_binning": False, "clean_caption": False}
    return {}


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


def knowing(pipeline: Any, process: Any, x0: Tensor) -> None:
    """Put a denoiser in place that answers with the training target of x0, whatever it is asked."""
    config, packed = pipeline.transformer.config, "Flux" in type(pipeline).__name__

    def forward(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        x_t = pipeline._unpack_latents(hidden_states, SIDE, SIDE, 8) if packed else hidden_states
        if isinstance(process, RectifiedFlow):
            sigma = timestep.reshape(-1, 1, 1, 1)
            noise = (x_t - (1 - sigma) * x0) / sigma
        else:
            signal, sigma = process.signal_and_noise(timestep, x_t)
            noise = (x_t - signal * x0) / sigma
        target = process.target(x0, noise, timestep)
        if packed:
            return (pipeline._pack_latents(target, *target.shape),)
        variance = torch.full_like(target, 7.0) if config.out_channels > config.in_channels else target[:, :0]
        return (torch.cat([target, variance], dim=1),)

    pipeline.transformer.forward = forward


def test_a_denoiser_that_knows_x0_gives_it_back_and_its_picture(base: Path) -> None:
    family, pipeline = family_of(base), load_pipeline(base)
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        x0, _ = family.encode_images(pipeline.vae, pixels)
        expected = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
    knowing(pipeline, family.process(base, (x0.shape[1], x0.shape[2], x0.shape[3])), x0)
    pictures = sample(pipeline, PROMPTS, [0, 1], num_inference_steps=10, guidance_scale=1, height=SIDE, width=SIDE)
    for picture, wanted in zip(pictures, pipeline.image_processor.postprocess(expected), strict=True):
        difference = np.abs(np.asarray(picture, dtype=int) - np.asarray(wanted, dtype=int))
        assert difference.max() <= 1


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


def t5(base: Path) -> set[str]:
    return {part.folder for part in family_of(base).role("text_encoder") if part.kind == "T5EncoderModel"}


def test_embeddings_and_pictures_equal_the_pipelines(base: Path) -> None:
    ours, plain = load_pipeline(base), plain_pipeline(base)
    plain.scheduler = type(ours.scheduler).from_config(ours.scheduler.config)
    family, tokens = family_of(base), family_of(base).tokenize(base, PROMPTS)
    with torch.no_grad():
        encoders = {part.folder: family.load(base, part.folder).eval() for part in family.text_encoders(base)}
        text = family.encode_text(encoders, tokens)
        states, other = plain.encode_prompt(PROMPTS)[:2]
    assert torch.equal(text["states"], states)
    assert torch.equal(text["pooled" if "pooled" in text else "mask"], other)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": SIDE, "width": SIDE}
    pictures = sample(ours, PROMPTS, [5, 6], dtype=torch.float32, **settings)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = plain(PROMPTS, generator=generators, **settings, **plain_arguments(plain)).images
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in expected]


def trained(base: Path, **train: Any) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        name: parameter.detach() + 0.02 * torch.randn(parameter.shape, generator=rng)
        for name, parameter in load_model(base, config_of(base, **train)).named_parameters()
    }


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # older versions know no other name
def test_an_export_samples_the_same_in_plain_diffusers_and_mlflow_and_is_stored_as_a_delta(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, model = trained(base), tmp_path / "model"
    export_pipeline(base, state, model, resolution=SIDE)
    verify_export(model, base, state, dtype=torch.float32)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": SIDE, "width": SIDE}
    ours = load_trained(base, state, device="cpu", dtype=torch.float32)
    expected = sample(ours, PROMPTS, [5, 6], dtype=torch.float32, **settings)
    plain = plain_pipeline(model)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    pictures = plain(PROMPTS, generator=generators, **settings, **plain_arguments(plain)).images
    # Its own size, where nothing says another.
    assert BaseModel(address=str(model), revision=None, directory=model).resolution == SIDE
    multiplies_bf16(monkeypatch, False)
    pictures += Served(model).pictures(PROMPTS, seed=5, num_inference_steps=2, guidance_scale=3.0)
    # MKL rounds by where weights lie, and these were loaded, those put in.
    for picture, same in zip(pictures, expected * 2, strict=True):
        assert np.abs(np.asarray(picture, dtype=np.int16) - np.asarray(same, dtype=np.int16)).max() <= 1
    write_delta(resolve_base_model(str(base)), model, tmp_path / "delta")
    rebuilt = rebuild(tmp_path / "delta", tmp_path / "rebuilt")
    assert {p.relative_to(rebuilt): p.read_bytes() for p in rebuilt.rglob("*.safetensors")} == {
        p.relative_to(model): p.read_bytes() for p in model.rglob("*.safetensors")
    }


def test_an_export_with_a_wrong_tensor_is_found(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state, model = trained(base, text_encoders="all"), tmp_path / "model"
    export_pipeline(base, state, model)
    verify_export(model, base, state, dtype=torch.float32)
    path = model / t5(base).pop() / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("wo.weight"))
    save_file(tensors | {name: tensors[name] + 0.5}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="is not what was trained"):
        verify_export(model, base, state, dtype=torch.float32)


def test_a_half_precision_variant_alone_in_shards_with_other_formats_beside(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "variant"
    plain_pipeline(base).to(torch.float16).save_pretrained(copy, variant="fp16", max_shard_size="100KB")
    for part in ("tokenizer", "tokenizer_2"):
        if (base / part).is_dir():
            shutil.rmtree(copy / part)
            shutil.copytree(base / part, copy / part)
    (copy / "flux1.safetensors").write_bytes(b"single file")
    (copy / "transformer" / "diffusion_flax_model.msgpack").write_bytes(b"flax")
    (copy / "text_encoder" / "model.onnx").write_bytes(b"onnx")
    model = resolve_base_model(str(copy))
    assert model.parameter_counts == resolve_base_model(str(base)).parameter_counts
    loaded = model.family.load(copy, "transformer").state_dict()
    for name, tensor in model.family.load(base, "transformer").state_dict().items():
        assert torch.equal(loaded[name], tensor.half().float()), name


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


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("transformer/config.json", {"in_channels": 384}, "noisy latents alone"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "flow matching"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    dev: Path, tmp_path: Path, file: str, change: dict[str, Any], told: str
) -> None:
    base = Path(shutil.copytree(dev, tmp_path / "base"))
    (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | change))
    with pytest.raises(InputError, match=told):
        resolve_base_model(str(base))


def test_a_side_that_cannot_be_packed_is_refused(dev: Path) -> None:
    with pytest.raises(InputError, match="multiple of 16"):
        resolve_base_model(str(dev)).settings.x0_shape(72)


def test_a_size_of_its_own_is_that_of_its_pictures(dev: Path, tmp_path: Path) -> None:
    state = trained(dev, text_encoders="none")
    export_pipeline(dev, state, tmp_path / "model", resolution=96)
    pipeline = load_pipeline(tmp_path / "model")
    pictures = sample(pipeline, PROMPTS[:1], [0], num_inference_steps=1, guidance_scale=1)
    assert pictures[0].size == (96, 96)
