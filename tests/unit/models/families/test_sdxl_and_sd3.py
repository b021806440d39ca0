"""What Stable Diffusion XL and Stable Diffusion 3 have that other families don't."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from replicas import sd3, sdxl, stable_diffusion
from replicas.plain import plain_pipeline, watched
from safetensors.torch import load_file, save_file
from served import Served

from dreambooth.config.settings import load_config
from dreambooth.data.images import find_instance_images
from dreambooth.data.prepare import prepare_data
from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.export import export_pipeline
from dreambooth.models.families import family_of
from dreambooth.models.process import RectifiedFlow
from dreambooth.sampling.sampler import load_pipeline, sample
from dreambooth.training.model import load_model
from pipelines.apps.generate import generate
from pipelines.plan.run_plan import make_plan

SIDE = 64
SCHEDULER = Path("scheduler", "scheduler_config.json")


def built(build: Any, folder: Path) -> Path:
    folder.mkdir()
    torch.manual_seed(0)
    build(folder)
    return folder


@pytest.fixture
def xl(tmp_path: Path) -> Path:
    return built(sdxl.build, tmp_path / "sdxl")


@pytest.fixture
def three(tmp_path: Path) -> Path:
    return built(sd3.build, tmp_path / "sd3")


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def run_of(base: Path, folder: Path, *overrides: str) -> Any:
    """A configuration for one photograph, 96 pixels wide and 72 high."""
    folder.mkdir(exist_ok=True)
    Image.effect_noise((96, 72), 80).convert("RGB").save(folder / "00.png")
    subject = {"name": "rex", "class_noun": "dog", "identifier": "sks", "instance_images": str(folder)}
    return load_config({"base_model": str(base), "subject": subject, "images": {"resolution": SIDE}}, overrides)


def black() -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE))


class TestTimeIds:
    """Original height and width, top and left of the crop in the square's scale, and the square's side twice."""

    def test_a_step_tells_the_denoiser_of_the_photograph_and_its_crop(self, xl: Path, tmp_path: Path) -> None:
        config = run_of(xl, tmp_path / "photographs")
        data = prepare_data(xl, config, find_instance_images(config.subject.instance_images), [black()])
        model = load_model(xl, config)
        with watched(model.denoiser) as calls, torch.no_grad():
            model(*data.batch(range(1)))
        instance, class_ = calls[0]["added_cond_kwargs.time_ids"].tolist()
        assert instance == [72, 96, 0, round((96 - 72) / 2 * SIDE / 72), SIDE, SIDE]
        assert class_ == [SIDE, SIDE, 0, 0, SIDE, SIDE]

    def test_every_crop_has_its_own_through_the_latent_cache(self, xl: Path, tmp_path: Path) -> None:
        config = run_of(xl, tmp_path / "photographs", "images.crop=random", "images.crops_per_image=3")
        data = prepare_data(xl, config, find_instance_images(config.subject.instance_images), [black()])
        with Image.open(tmp_path / "photographs" / "00.png") as photograph:
            scaled = photograph.resize((round(96 * SIDE / 72), SIDE), Image.Resampling.LANCZOS)
        ids = data.instance.conditions["time_ids"]
        assert len(set(ids[:, 3].tolist())) == 3
        family = family_of(xl)
        for entry, left in enumerate(ids[:, 3].int().tolist()):
            pixels = np.asarray(scaled.crop((left, 0, left + SIDE, SIDE)), dtype=np.float32) / 127.5 - 1
            mean, _ = family.encode_images(family.load_vae(xl, "cpu"), torch.tensor(pixels).permute(2, 0, 1)[None])
            errors = (data.instance.latents.mean - mean).square().mean((1, 2, 3))
            assert int(errors.argmin()) == entry
        drawn = {tuple(data.batch(range(pair, pair + 1)).conditions["time_ids"][0].tolist()) for pair in range(20)}
        assert drawn == {tuple(row) for row in ids.tolist()}

    def test_large_photographs_keep_their_size(self, xl: Path) -> None:
        """bf16 would round 683 to 684, fp16 4097 to 4096."""
        ids = family_of(xl).conditions([(4097, 683)], [(0, 341)], (1024, 1024))["time_ids"]
        assert ids.tolist() == [[4097, 683, 0, 341, 1024, 1024]]


@pytest.mark.parametrize("zeros", [True, False, None])
def test_no_text_is_what_the_index_says(xl: Path, tmp_path: Path, zeros: bool | None) -> None:
    """force_zeros_for_empty_prompt: zeros, or the states of "", in sampling and for pairs trained without text."""
    index = json.loads((xl / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": zeros}
    if zeros is None:
        del index["force_zeros_for_empty_prompt"]
    (xl / "model_index.json").write_text(json.dumps(index))
    pipeline, plain = load_pipeline(xl), plain_pipeline(xl)
    plain.scheduler = load_pipeline(xl).scheduler
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 6.0}
    found = sample(pipeline, ["a dog"], [0], dtype=torch.float32, **settings)[0]
    expected = plain("a dog", generator=torch.Generator().manual_seed(0), **settings).images[0]
    assert abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1
    with watched(pipeline.unet) as calls:
        sample(pipeline, ["a dog"], [0], dtype=torch.float32, **settings)
    states, pooled = calls[0]["encoder_hidden_states"][0], calls[0]["added_cond_kwargs.text_embeds"][0]
    assert bool(states.any()) == (zeros is False)
    for text_encoders in ("all", "none"):
        config = run_of(
            xl, tmp_path / "photographs", "train.caption_dropout=0.5", f"train.text_encoders={text_encoders}"
        )
        data = prepare_data(xl, config, find_instance_images(config.subject.instance_images), [black()])
        model = load_model(xl, config)
        with watched(model.denoiser) as calls, torch.no_grad():
            model(*data.batch(range(8)))
        rows = zip(calls[0]["encoder_hidden_states"], calls[0]["added_cond_kwargs.text_embeds"], strict=True)
        silent = [
            torch.allclose(one, states, atol=1e-5) and torch.allclose(two, pooled, atol=1e-5) for one, two in rows
        ]
        assert silent[:8] == silent[8:]
        assert 0 < sum(silent[:8]) < 8


def test_vae_of_the_repository_stays_behind(xl: Path, tmp_path: Path) -> None:
    model = load_model(xl, run_of(xl, tmp_path / "photographs", "train.text_encoders=none"))
    state = model.exported({name: each.detach() for name, each in model.named_parameters()})
    export_pipeline(xl, state, tmp_path / "model")
    assert not (tmp_path / "model" / "vae_1_0").exists()
    assert load_pipeline(tmp_path / "model", dtype=torch.float16).vae.dtype is torch.float32


def test_draws_of_sd3_are_shifted_as_the_samplers_sigmas(three: Path) -> None:
    process = family_of(three).process(three, (16, 8, 8))
    assert process == RectifiedFlow(shift=3.0)
    rng = torch.Generator().manual_seed(0)
    drawn = torch.stack([process.draw(rng) for _ in range(4000)])
    # The median of sigmoid(N(0, 1)) is 1/2, and 3 / 2 / (1 + 2 / 2) = 3 / 4.
    assert float(drawn.median()) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sd3_has_the_dtype_that_was_asked_for(three: Path, dtype: torch.dtype) -> None:
    transformer = family_of(three).load(three, "transformer", dtype)
    assert {parameter.dtype for parameter in transformer.parameters()} == {dtype}
    text = {"encoder_hidden_states": torch.zeros(1, 333, 48), "pooled_projections": torch.zeros(1, 36)}
    inputs = {"hidden_states": torch.zeros(1, 16, 8, 8), **text}
    with torch.no_grad():
        output = transformer(**{name: one.to(dtype) for name, one in inputs.items()}, timestep=torch.ones(1))
    assert output.sample.dtype is dtype


def test_sd3_keeps_the_positions_of_its_base_at_another_resolution(three: Path, tmp_path: Path) -> None:
    config = run_of(three, tmp_path / "photographs", "train.text_encoders=none")
    model = load_model(three, config)
    state = model.exported({name: each.detach() for name, each in model.named_parameters()})
    export_pipeline(three, state, tmp_path / "model", resolution=32)
    base, exported = plain_pipeline(three).transformer, plain_pipeline(tmp_path / "model").transformer
    assert exported.config.sample_size == 4
    assert torch.equal(base.pos_embed.pos_embed, exported.pos_embed.pos_embed)


def test_t5_is_frozen_by_default_and_has_no_dropout_where_it_is_trained(three: Path, tmp_path: Path) -> None:
    frozen = load_model(three, run_of(three, tmp_path / "photographs"))
    assert list(frozen.text_encoders) == ["text_encoder", "text_encoder_2"]
    trained = load_model(three, run_of(three, tmp_path / "photographs", "train.text_encoders=[text_encoder_3]"))
    assert list(trained.text_encoders) == ["text_encoder_3"]
    tokens = family_of(three).tokenize(three, ["a photo of a dog"])
    assert trained.training
    states = [
        trained.family.encode_with("text_encoder_3", trained.text_encoders["text_encoder_3"], tokens) for _ in "12"
    ]
    assert torch.equal(*(each["text_encoder_3.states"] for each in states))


class TestWithoutT5:
    @pytest.fixture
    def alone(self, three: Path, tmp_path: Path) -> Path:
        """The same base where neither index nor folders have T5."""
        base = Path(shutil.copytree(three, tmp_path / "alone"))
        for folder in ("text_encoder_3", "tokenizer_3"):
            shutil.rmtree(base / folder)
        change(base / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
        return base

    def test_an_index_that_leaves_it_out_is_believed(self, three: Path, alone: Path, tmp_path: Path) -> None:
        change(three / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
        left_out, missing = resolve_base_model(str(three)), resolve_base_model(str(alone))
        assert left_out.hash == missing.hash
        assert left_out.parameter_counts == missing.parameter_counts
        settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "dtype": torch.float32}
        one, other = (sample(load_pipeline(base), ["a dog"], [0], **settings)[0] for base in (three, alone))
        assert one.tobytes() == other.tobytes()
        model = load_model(three, run_of(three, tmp_path / "photographs", "train.text_encoders=none"))
        state = model.exported({name: each.detach() for name, each in model.named_parameters()})
        export_pipeline(three, state, tmp_path / "model")
        assert not (tmp_path / "model" / "text_encoder_3").exists()
        plain_pipeline(tmp_path / "model")

    def test_a_copy_that_lacks_it_is_warned_of(self, three: Path, alone: Path) -> None:
        assert resolve_base_model(str(three)).settings.warning is None
        assert resolve_base_model(str(alone)).settings.warning is None
        change(alone / "model_index.json", text_encoder_3=["transformers", "T5EncoderModel"])
        warning = resolve_base_model(str(alone)).settings.warning
        assert warning is not None
        assert "copied without text_encoder_3" in warning

    def test_training_one_that_is_missing_is_refused(self, alone: Path, tmp_path: Path) -> None:
        config = run_of(alone, tmp_path / "photographs", "train.text_encoders=[text_encoder_3]")
        with pytest.raises(InputError, match="names text_encoder_3, but the base model has text_encoder, text_encoder"):
            load_model(alone, config)


class TestRefused:
    """Before any work starts, with what was expected."""

    def test_a_flow_taken_for_linear_betas(self, xl: Path, three: Path, tmp_path: Path) -> None:
        fifteen = built(stable_diffusion.build, tmp_path / "sd")
        for base in (xl, fifteen):
            shutil.copyfile(three / SCHEDULER, base / "scheduler" / "scheduler_config.json")
            with pytest.raises(
                InputError, match=r"FlowMatchEulerDiscreteScheduler, of rectified flow; expected .* diff"
            ):
                resolve_base_model(str(base))

    def test_betas_taken_for_a_flow(self, xl: Path, three: Path) -> None:
        shutil.copyfile(xl / SCHEDULER, three / SCHEDULER)
        with pytest.raises(InputError, match="EulerDiscreteScheduler, of diffusion; expected a scheduler of rectified"):
            resolve_base_model(str(three))

    def test_a_schedule_of_noise_levels(self, xl: Path) -> None:
        change(xl / SCHEDULER, _class_name="EDMEulerScheduler")
        with pytest.raises(InputError, match="EDMEulerScheduler, of EDM; expected a scheduler of diffusion"):
            resolve_base_model(str(xl))

    def test_a_shift_by_resolution(self, three: Path) -> None:
        change(three / SCHEDULER, use_dynamic_shifting=True)
        with pytest.raises(InputError, match="use_dynamic_shifting is true; expected false"):
            resolve_base_model(str(three))

    def test_a_unet_without_time_ids(self, xl: Path) -> None:
        change(xl / "unet" / "config.json", addition_embed_type=None)
        with pytest.raises(InputError, match="addition_embed_type is null; expected text_time"):
            resolve_base_model(str(xl))

    def test_channels_that_the_vae_does_not_have(self, three: Path) -> None:
        change(three / "transformer" / "config.json", in_channels=32)
        with pytest.raises(InputError, match="in_channels is 32, but latent_channels of the VAE is 16"):
            resolve_base_model(str(three))

    def test_half_a_patch(self, three: Path, tmp_path: Path) -> None:
        config = run_of(three, tmp_path / "photographs", "images.resolution=72")
        with pytest.raises(InputError, match=r"images\.resolution is 72; expected a multiple of 16"):
            make_plan(config)

    def test_half_a_patch_of_a_sample(self, three: Path) -> None:
        with pytest.raises(InputError, match="height is 72; expected a multiple of 16 for Stable"):
            generate(str(three), "a dog", height=72, width=64)

    @pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
    def test_half_a_patch_of_a_sample_from_mlflow(self, three: Path) -> None:
        settings = {"seed": 0, "num_inference_steps": 1, "guidance_scale": 1.0, "height": 64, "width": 72}
        with pytest.raises(MlflowException, match=r"width 72: .* divisible by 16"):
            Served(three).pictures(["a dog"], **settings)

    @pytest.mark.parametrize("folder", ["text_encoder_2", "tokenizer_2"])
    def test_a_missing_part(self, xl: Path, three: Path, folder: str) -> None:
        for base in (xl, three):
            shutil.rmtree(base / folder)
            with pytest.raises(InputError, match=f"lacks {folder}; is the copy complete"):
                resolve_base_model(str(base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_projection_is_kept_where_it_is_the_identity(three: Path, dtype: torch.dtype) -> None:
    family, path = family_of(three), three / "text_encoder" / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    assert family.kept(three, "text_encoder") == ["text_projection.weight"]
    assert family.kept(three, "text_encoder_2") == []
    projection = tensors["text_projection.weight"]
    projection[3, 4] = 1e-3
    save_file(tensors, path)
    assert family.kept(three, "text_encoder") == []
    path.unlink()
    assert family.kept(three, "text_encoder") == ["text_projection.weight"]  # as far as configurations tell
