"""Both stages of DeepFloyd IF are trained on what sampling gives them, and exported as what diffusers can sample."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from replicas import deepfloyd
from replicas.plain import plain_pipeline
from served import Served
from torch import Tensor

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.batches import TrainingData
from dreambooth.data.identifier import candidates, choose_identifier, token_ids_in_prompts
from dreambooth.data.images import InstanceImage
from dreambooth.data.prepare import prepare_data
from dreambooth.errors import InputError
from dreambooth.models.base_model import BaseModel, resolve_base_model
from dreambooth.models.delta import rebuild, write_delta
from dreambooth.models.export import export_pipeline, verify_export
from dreambooth.models.families import family_of, load_tokenizer
from dreambooth.models.process import SuperResolution
from dreambooth.sampling.sampler import load_pipeline, sample
from dreambooth.training.empty_step import EmptyStep
from dreambooth.training.engine import TorchEngine
from dreambooth.training.loop import fit
from dreambooth.training.model import DreamBoothModel, load_model

STAGES = {"deepfloyd-if-1": deepfloyd.build, "deepfloyd-if-2": deepfloyd.build_super_resolution}
SIDES = {"deepfloyd-if-1": 16, "deepfloyd-if-2": 64}
PROMPTS = [" A photo of SKS dog ", "a cat on the beach"]


@pytest.fixture(scope="module", params=STAGES)
def stage(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, build in STAGES.items():
            (folder / name).mkdir()
            build(folder / name)
    return {name: folder / name for name in STAGES}


@pytest.fixture
def base(bases: dict[str, Path], stage: str) -> Path:
    return bases[stage]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for place in range(2):
        pixels = rng.integers(0, 256, (80, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    return folder


def configured(base: Path, photos: Path, **train: Any) -> DreamBoothConfig:
    subject = {"name": "rex", "class_noun": "Dog", "identifier": "sks", "instance_images": str(photos)}
    settings = {"mixed_precision": "no", "max_train_steps": 2, "micro_batch_size": 2} | train
    return load_config({"base_model": str(base), "subject": subject, "train": settings})


def prepared(base: Path, config: DreamBoothConfig, photos: Path) -> TrainingData:
    images = [InstanceImage(address=str(path)) for path in sorted(photos.iterdir())]
    side = 64 if family_of(base).pipeline_class == "IFSuperResolutionPipeline" else 16
    class_images = [Image.open(path).resize((side, side)) for path in sorted(photos.iterdir())]
    return prepare_data(base, config, images, class_images)


def further(stage: str, count: int) -> dict[str, Any]:
    """Arguments of a call besides the prompt: the small pictures of stage II."""
    if stage == "deepfloyd-if-1":
        return {}
    rng = np.random.default_rng(1)
    return {"image": [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]}


@contextmanager
def listening(denoiser: Any) -> Iterator[list[dict[str, Tensor]]]:
    """Tensors that a denoiser is called with, by name."""
    calls: list[dict[str, Tensor]] = []

    def listen(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        arguments = dict(zip(("sample", "timestep"), given, strict=False)) | named
        calls.append({name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)})

    hook = denoiser.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def knowing(pipeline: Any, process: Any, x0: Tensor) -> Iterator[None]:
    """A pipeline whose denoiser answers with the training target of x0 and a variance of zeros."""
    unet, forward = pipeline.unet, pipeline.unet.forward

    def answer(sample: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        noisy, moments = sample[:, :3], timestep.expand(len(sample))
        signal, sigma = process.signal_and_noise(moments, noisy)
        target = process.target(x0, (noisy - signal * x0) / sigma, moments)
        return (torch.cat([target, torch.zeros_like(target)], dim=1),)

    unet.forward = answer
    try:
        yield
    finally:
        unet.forward = forward


class TestWhatTheDenoiserIsGiven:
    def test_has_the_names_types_and_shapes_of_the_pipeline(self, base: Path, stage: str, photos: Path) -> None:
        config = configured(base, photos)
        model, data = load_model(base, config), prepared(base, config, photos)
        with listening(model.denoiser) as ours:
            model(*data.batch(range(2)))
        pipeline = plain_pipeline(base)
        with listening(pipeline.unet) as theirs:
            pipeline([*PROMPTS, *PROMPTS], num_inference_steps=1, guidance_scale=1.0, **further(stage, 4))

        def kinds(call: dict[str, Tensor]) -> dict[str, Any]:
            return {name: (value.shape, value.dtype) for name, value in call.items() if name != "timestep"}

        assert kinds(ours[0]) == kinds(theirs[0])
        assert ours[0]["timestep"].dtype == theirs[0]["timestep"].dtype == torch.int64
        assert ours[0]["timestep"].shape == (4,)

    def test_holds_the_states_of_the_pipelines_text(self, base: Path, photos: Path) -> None:
        config = configured(base, photos)
        data, pipeline = prepared(base, config, photos), plain_pipeline(base)
        prompts = ["a photo of sks Dog"] * 2 + ["a photo of a Dog"]
        expected, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        assert data.class_ is not None
        states = [half.text["text_encoder.states"] for half in (data.instance, data.class_)]
        assert torch.equal(torch.cat(states), expected)
        assert not data.runs_text_encoders

    def test_capitals_and_spaces_around_a_prompt_do_not_matter(self, base: Path) -> None:
        family, pipeline = family_of(base), plain_pipeline(base)
        expected, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        tokens = family.tokenize(base, PROMPTS)
        with torch.no_grad():
            encoded = family.encode_with("text_encoder", pipeline.text_encoder, tokens)
        assert torch.equal(encoded["text_encoder.states"], expected)
        tokenizer = load_tokenizer(base)
        assert token_ids_in_prompts(tokenizer, "SKS") == token_ids_in_prompts(tokenizer, "sks")
        assert tokenizer.model_max_length == tokens["text_encoder.input_ids"].shape[1] == 77

    def test_is_the_small_picture_as_sampling_scales_and_noises_it(
        self, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from diffusers.pipelines.deepfloyd_if import pipeline_if_superresolution as theirs

        base = bases["deepfloyd-if-2"]
        family, x0 = family_of(base), torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
        process = family.process(base, (3, 64, 64))
        given = family.draw_conditions(process, x0, {}, torch.Generator().manual_seed(0))
        rng = torch.Generator().manual_seed(0)
        level, noise = int(torch.randint(1000, (), generator=rng)), torch.randn(1, 3, 64, 64, generator=rng)
        pipeline = plain_pipeline(base)
        monkeypatch.setattr(theirs, "randn_tensor", lambda *_, **__: noise)
        small = x0.unflatten(2, (16, 4)).unflatten(1, (16, 4)).mean((2, 4))  # of 16 pixels a side
        with listening(pipeline.unet) as calls:
            pipeline("a dog", image=small[None], noise_level=level, num_inference_steps=1, guidance_scale=1.0)
        assert torch.equal(given["noise_level"][None], calls[0]["class_labels"])
        torch.testing.assert_close(given["small"][None], calls[0]["sample"][:, 3:], rtol=0, atol=1e-6)

    def test_is_small_pictures_of_all_levels(self, bases: dict[str, Path], photos: Path) -> None:
        base = bases["deepfloyd-if-2"]
        data = prepared(base, configured(base, photos), photos)
        levels = data.batch(range(200)).conditions["noise_level"]
        assert levels.min() < 50
        assert levels.max() > 950
        assert torch.equal(levels, data.batch(range(200)).conditions["noise_level"])

    def test_is_small_pictures_of_the_levels_that_the_base_names(
        self, bases: dict[str, Path], photos: Path, tmp_path: Path
    ) -> None:
        base = shutil.copytree(bases["deepfloyd-if-2"], tmp_path / "base")
        path = base / "image_noising_scheduler" / "scheduler_config.json"
        for levels, sampled in ((None, 250), (40, 10)):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"_levels": levels}))
            drawn = prepared(base, configured(base, photos), photos).batch(range(200)).conditions["noise_level"]
            assert (levels or 1000) * 0.9 < drawn.max() < (levels or 1000)
            pipeline = load_pipeline(base)
            with listening(pipeline.unet) as calls:
                sample(
                    pipeline, ["a dog"], [0], num_inference_steps=1, guidance_scale=1.0, images=further("", 1)["image"]
                )
            assert calls[0]["class_labels"].unique().tolist() == [sampled]
        asked = configured(base, photos)
        asked = asked.model_copy(
            update={"super_resolution": asked.super_resolution.model_copy(update={"noise_levels": 400})}
        )
        drawn = prepared(base, asked, photos).batch(range(200)).conditions["noise_level"]
        assert 360 < drawn.max() < 400  # which may be more than the base's 40
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_levels": "40"}))
        with pytest.raises(InputError, match='_levels is "40"; expected null or a whole number'):
            resolve_base_model(str(base), scales_up=True)


class TestNoise:
    @pytest.mark.parametrize("sampler", ["ours", "the base's"])
    def test_a_denoiser_that_knows_the_picture_gives_it_back(self, base: Path, stage: str, sampler: str) -> None:
        side, family = SIDES[stage], family_of(base)
        process = family.process(base, (3, side, side))
        pipeline = load_pipeline(base) if sampler == "ours" else plain_pipeline(base)
        x0 = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1
        with knowing(pipeline, process, x0):
            found = pipeline(
                "a dog", num_inference_steps=10, guidance_scale=1.0, output_type="pt", **further(stage, 1)
            ).images
        torch.testing.assert_close(found, x0, rtol=0, atol=1e-5)
        assert pipeline.scheduler.config.thresholding

    def test_a_strongly_guided_picture_keeps_within_the_thresholds(self, base: Path, stage: str) -> None:
        pipeline = load_pipeline(base)
        with torch.no_grad():
            pipeline.unet.conv_out.weight.mul_(50)  # as far off as a guidance that is much too strong
        found = pipeline(
            "a dog", num_inference_steps=5, guidance_scale=9.0, output_type="pt", **further(stage, 1)
        ).images
        assert torch.isfinite(found).all()
        assert found.abs().max() <= 1

    def test_losses_are_those_of_the_pipelines_own_parts(self, base: Path, photos: Path) -> None:
        config = configured(base, photos)
        model, data = load_model(base, config).eval(), prepared(base, config, photos)
        batch, pipeline = data.batch(range(2)), plain_pipeline(base)
        noisy = pipeline.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        more: dict[str, Tensor] = {}
        if isinstance(data.process, SuperResolution):
            noisy = torch.cat([noisy, batch.conditions["small"]], dim=1)
            more = {"class_labels": batch.conditions["noise_level"]}
        states, _ = pipeline.encode_prompt(
            ["a photo of sks Dog"] * 2 + ["a photo of a Dog"] * 2, do_classifier_free_guidance=False
        )
        with torch.no_grad():
            predicted = pipeline.unet(noisy, batch.timesteps, encoder_hidden_states=states, **more).sample[:, :3]
            losses = model(*batch)
        errors = (predicted - batch.noise).square().mean((1, 2, 3))
        torch.testing.assert_close(losses.instance, errors[:2].mean())
        torch.testing.assert_close(losses.prior, errors[2:].mean())
        assert len(batch.timesteps.unique()) == 4

    def test_starts_from_pixels(self, base: Path, stage: str, photos: Path) -> None:
        data = prepared(base, configured(base, photos), photos)
        assert data.class_ is not None
        first = np.asarray(Image.open(photos / "0.png").resize((SIDES[stage],) * 2))
        expected = torch.from_numpy(first.copy()).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(data.class_.latents.sample(0, torch.randn(expected.shape)), expected)


class TestTraining:
    @pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
    def test_every_parameter_has_a_gradient_but_the_rows_of_the_variance(
        self, base: Path, photos: Path, checkpointing: bool
    ) -> None:
        config = configured(base, photos, text_encoders="all", gradient_checkpointing=checkpointing)
        model, data = load_model(base, config), prepared(base, config, photos)
        assert data.runs_text_encoders
        assert model.denoiser.is_gradient_checkpointing is checkpointing
        for step in range(3):
            model(*data.batch(range(2 * step, 2 * step + 2))).total.backward()
        without = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()]
        assert without == []
        for parameter in (model.denoiser.conv_out.weight, model.denoiser.conv_out.bias):  # type: ignore[union-attr]
            assert parameter.grad[:3].flatten(1 if parameter.ndim > 1 else 0).any()  # type: ignore[union-attr]
            assert not parameter.grad[3:].any()  # type: ignore[union-attr, index]

    def test_recomputed_activations_give_the_same_gradients(self, base: Path, photos: Path) -> None:
        gradients = []
        for checkpointing in (False, True):
            config = configured(base, photos, text_encoders="all", gradient_checkpointing=checkpointing)
            model, data = load_model(base, config), prepared(base, config, photos)
            model(*data.batch(range(2))).total.backward()
            gradients.append({name: one.grad for name, one in model.named_parameters()})
        torch.testing.assert_close(gradients[1], gradients[0])

    def test_weight_decay_leaves_the_rows_of_the_variance_alone(self, base: Path, photos: Path) -> None:
        config = configured(base, photos, weight_decay=1.0, learning_rate=0.01, ema_decay=0.9)
        model, data = load_model(base, config), prepared(base, config, photos)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        engine = TorchEngine(model, config.train)
        rates: list[float] = []
        fit(engine, data, config.train, on_step=lambda _, found: rates.append(found.text_encoder_learning_rate))  # type: ignore[union-attr]
        after = engine.state_dict()
        for name in ("denoiser.conv_out.weight", "denoiser.conv_out.bias"):
            assert torch.equal(after[name][3:], before[name][3:])
            assert not torch.equal(after[name][:3], before[name][:3])
        assert [name for name in before if torch.equal(after[name], before[name])] == []
        assert rates == [0.0, 0.0]

    def test_a_rate_for_a_text_encoder_that_is_not_trained_is_refused(self, base: Path, photos: Path) -> None:
        config = configured(base, photos, text_encoder_learning_rate=1e-6)
        with pytest.raises(InputError, match=r"text_encoder_learning_rate is 1e-06, but no text encoder"):
            load_model(base, config)

    def test_a_trained_t5_draws_nothing_at_random(self, base: Path, photos: Path) -> None:
        config = configured(base, photos, text_encoders="all")
        model, data = load_model(base, config), prepared(base, config, photos)
        assert model.training
        losses = [model(*data.batch(range(2))).total.item() for _ in range(2)]
        assert losses[0] == losses[1]

    def test_the_identifiers_embedding_in_t5_learns_at_its_own_rate(self, base: Path, photos: Path) -> None:
        config = configured(base, photos, text_encoders="all", identifier_learning_rate=0.1)
        model, data = load_model(base, config), prepared(base, config, photos)
        fit(TorchEngine(model, config.train), data, config.train)
        assert model.identifier_embeddings["text_encoder"].change.abs().max() > 0.05  # type: ignore[union-attr, operator]

    def test_a_step_can_be_counted_without_weights(self, base: Path, stage: str) -> None:
        step = EmptyStep(base, size=(SIDES[stage], SIDES[stage]), images=2, text_encoders=(), checkpointing=True)
        assert step.model_pred().shape == (2, 3, SIDES[stage], SIDES[stage])


def moved(base: Path, config: DreamBoothConfig) -> tuple[DreamBoothModel, dict[str, Tensor]]:
    """A model and its exported state, every value moved a little."""
    model, rng = load_model(base, config), torch.Generator().manual_seed(0)
    state = {
        name: parameter.detach() + 0.01 * torch.randn(parameter.shape, generator=rng)
        for name, parameter in model.named_parameters()
    }
    return model, model.exported(state)


class TestExport:
    @pytest.mark.parametrize("text_encoders", ["none", "all"])
    def test_diffusers_samples_the_same_picture(
        self, base: Path, stage: str, photos: Path, tmp_path: Path, text_encoders: str
    ) -> None:
        from diffusers import DPMSolverMultistepScheduler

        _, state = moved(base, configured(base, photos, text_encoders=text_encoders))
        export_pipeline(base, state, tmp_path / "model")
        verify_export(tmp_path / "model", base, state, dtype=torch.float32)
        pipeline = plain_pipeline(tmp_path / "model")
        assert pipeline.scheduler.config.variance_type == "fixed_small"
        small = further(stage, 2)
        settings = {"num_inference_steps": 3, "guidance_scale": 4.0}
        drawn = pipeline(PROMPTS, clean_caption=False, **settings, **small).images  # by DDPM
        assert len(drawn) == 2
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, lambda_min_clipped=-5.1)
        pipeline.unet.to(memory_format=torch.channels_last)  # other orders of sums, other last bits
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        theirs = pipeline(PROMPTS, clean_caption=False, generator=generators, **settings, **small).images
        ours = sample(
            load_pipeline(tmp_path / "model"),
            PROMPTS,
            [3, 4],
            **settings,  # type: ignore[arg-type]
            dtype=torch.float32,
            images=small.get("image"),
        )
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))

    def test_a_wrong_tensor_is_seen(self, base: Path, photos: Path, tmp_path: Path) -> None:
        _, state = moved(base, configured(base, photos, text_encoders="all"))
        export_pipeline(base, state, tmp_path / "model")
        state["denoiser.conv_in.bias"][0] += 1e-3
        with pytest.raises(ValueError, match=r"conv_in\.bias .*is not what was trained"):
            verify_export(tmp_path / "model", base, state, dtype=torch.float32)

    def test_its_change_against_the_base_restores_it(
        self, bases: dict[str, Path], photos: Path, tmp_path: Path
    ) -> None:
        directory = bases["deepfloyd-if-1"]
        base = BaseModel(address=str(directory), revision=None, directory=directory)
        _, state = moved(directory, configured(directory, photos))
        export_pipeline(directory, state, tmp_path / "model", dtype=torch.float16)
        write_delta(base, tmp_path / "model", tmp_path / "delta")
        rebuild(tmp_path / "delta", tmp_path / "copy", base)
        files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
        assert (tmp_path / "model" / "tokenizer" / "spiece.model") in files
        for path in files:
            assert (tmp_path / "copy" / path.relative_to(tmp_path / "model")).read_bytes() == path.read_bytes()


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # older versions know no other name
def test_the_served_model_refuses_what_the_model_would_not_read(bases: dict[str, Path]) -> None:
    """T5's tokenizer would take 512 tokens."""
    base = bases["deepfloyd-if-1"]
    served = Served(base, tokens=load_tokenizer(base).model_max_length)
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0}
    assert len(served.pictures(["[V] " + "dog " * 75], seed=0, **settings)) == 1
    with pytest.raises(MlflowException, match="has 78 tokens, and the model reads 77"):
        served.pictures(["[V] " + "dog " * 76], seed=0, **settings)


def write_vocabulary(path: Path, *, rare: list[str]) -> None:
    """A sentencepiece model of 400 pieces, those in `rare` in the part that the paper draws identifiers from."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    common = [f"\u2581word{place}" for place in range(80)]
    rest = [f"\u2581other{place}" for place in range(290)]
    letters = [*"abcdefghijklmnopqrstuvwxyz", "\u2581"]
    model = schema.ModelProto()
    for place, piece in enumerate(("<pad>", "</s>", "<unk>")):
        model.pieces.add(piece=piece, score=0.0, type=2 if place == 2 else 3)
    for place, piece in enumerate([*common, *(f"\u2581{one}" for one in rare), *rest, *letters]):
        model.pieces.add(piece=piece, score=-1.0 - place / 10, type=1)
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size = 1, len(model.pieces)
    trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = 0, 1, 2, -1
    path.write_bytes(model.SerializeToString())


class TestRepositories:
    def test_nothing_but_its_own_parts_is_needed_or_written(self, base: Path, photos: Path, tmp_path: Path) -> None:
        _, state = moved(base, configured(base, photos))
        export_pipeline(base, state, tmp_path / "model")
        index = json.loads((tmp_path / "model" / "model_index.json").read_text())
        unused = ("safety_checker", "feature_extractor", "watermarker")
        assert [index[name] for name in unused] == [[None, None]] * 3
        assert index["requires_safety_checker"] is False

    def test_stage_i_is_a_base_model(self, bases: dict[str, Path]) -> None:
        base = resolve_base_model(str(bases["deepfloyd-if-1"]))
        assert base.resolution == 16
        assert base.settings.x0_shape(16) == (3, 16, 16)
        assert base.embedding_width("text_encoder") == 48
        assert set(base.parameter_counts) == {"unet", "text_encoder"}

    def test_stage_ii_alone_is_none(self, bases: dict[str, Path]) -> None:
        with pytest.raises(InputError, match=r"stage II.*stage I"):
            resolve_base_model(str(bases["deepfloyd-if-2"]))

    def test_a_side_that_the_unet_cannot_halve_is_refused(self, bases: dict[str, Path]) -> None:
        with pytest.raises(InputError, match="17; expected a multiple of 2"):
            resolve_base_model(str(bases["deepfloyd-if-1"])).settings.x0_shape(17)

    def test_a_unet_with_other_inputs_is_refused(self, bases: dict[str, Path], tmp_path: Path) -> None:
        copy = Path(shutil.copytree(bases["deepfloyd-if-1"], tmp_path / "base"))
        path = copy / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 6}))
        with pytest.raises(InputError, match="in_channels is 6; expected 3"):
            resolve_base_model(str(copy))

    def test_an_identifier_is_chosen_from_t5s_vocabulary(self, bases: dict[str, Path], tmp_path: Path) -> None:
        copy = Path(shutil.copytree(bases["deepfloyd-if-1"], tmp_path / "base"))
        write_vocabulary(copy / "tokenizer" / "spiece.model", rare=["xkq", "wvz", "qzj"])
        tokenizer = load_tokenizer(copy)
        assert {candidate.text for candidate in candidates(tokenizer)} == {"xkq", "wvz", "qzj"}
        chosen = choose_identifier(tokenizer, subject_name="rex")
        assert len(token_ids_in_prompts(tokenizer, chosen)) == 1
