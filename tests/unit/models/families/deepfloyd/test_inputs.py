"""The denoisers of DeepFloyd IF are called in training as sampling calls them."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from deepfloyd_runs import PROMPTS, configured, further, prepared
from replicas.plain import plain_pipeline
from torch import Tensor

from dreambooth.data.identifier import token_ids_in_prompts
from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.families import family_of, load_tokenizer
from dreambooth.sampling.sampler import load_pipeline, sample
from dreambooth.training.model import load_model


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
