"""Long texts: CLIP cuts them and T5 reads them whole, as in the plain pipelines; the identifier is never cut off."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from processor import multiplies_bf16
from replicas.plain import plain_pipeline
from served import Served

from dreambooth.data.prompt_checks import PromptReader
from dreambooth.errors import InputError
from dreambooth.models.families import family_of
from dreambooth.models.text_readers import readers_of_pipeline, text_readers
from dreambooth.sampling.sampler import load_pipeline, sample
from pipelines.plan.run_plan import make_plan

SIDE = 64
LENGTHS = {
    "stable-diffusion-xl": {"text_encoder": 77, "text_encoder_2": 77},
    "stable-diffusion-3.5": {"text_encoder": 77, "text_encoder_2": 77, "text_encoder_3": 256},
    "stable-diffusion-3-without-t5": {"text_encoder": 77, "text_encoder_2": 77},
    "flux-dev": {"text_encoder": 77, "text_encoder_2": 512},
    "pixart-sigma": {"text_encoder": 300},
    "deepfloyd-if": {"text_encoder": 77},
}
"""Tokens that each text encoder reads: what the plain pipelines give them by default."""
WITH_T5_AND_CLIP = ["stable-diffusion-3.5", "flux-dev"]
LONG, TOO_LONG = "dog " * 90, "dog " * 600


@pytest.mark.parametrize(("base", "lengths"), LENGTHS.items(), indirect=["base"])
def test_every_text_encoder_reads_what_the_pipeline_gives_it(base: Path, lengths: dict[str, int]) -> None:
    of_folder, of_pipeline = text_readers(base), readers_of_pipeline(plain_pipeline(base))
    for readers in (of_folder, of_pipeline):
        assert {reader.folder: reader.length for reader in readers} == lengths
    tokens = family_of(base).tokenize(base, [TOO_LONG])
    assert {folder: tokens[f"{folder}.input_ids"].shape[1] for folder in lengths} == lengths


def check(base: Path, text: str) -> tuple[str, ...]:
    return PromptReader(readers=text_readers(base), identifier="sks").check(text, what="it", whole=True)


@pytest.mark.parametrize("base", LENGTHS, indirect=True)
def test_a_text_that_no_encoder_reads_whole_is_refused(base: Path) -> None:
    with pytest.raises(InputError, match=r"it has \d+ tokens, and the base model.* reads \d+: .* is cut off; sh"):
        check(base, f"[V] {TOO_LONG}")


@pytest.mark.parametrize("base", WITH_T5_AND_CLIP, indirect=True)
class TestTextsThatClipCuts:
    def test_are_read_by_t5(self, base: Path, config: Any) -> None:
        clip = text_readers(base)[0]
        assert len(clip.tokenizer(LONG).input_ids) > clip.length
        assert check(base, f"[V] {LONG}") == ()
        settings = ("evaluation.every=1", "evaluation.bank=miniature")
        made = make_plan(config(f"evaluation.prompts=['[V] {LONG.strip()}']", "evaluation.protocol=none"))
        assert not [warning for warning in made.warnings if "cut off" in warning]
        with pytest.raises(InputError, match="and the bank miniature, which measures CLIP-T, reads"):
            make_plan(config(f"evaluation.prompts=['[V] {LONG.strip()}']", *settings))

    def test_are_refused_where_the_identifier_is_cut_off(self, base: Path, config: Any) -> None:
        with pytest.raises(InputError, match=r"the base model's text_encoder reads 75: .*, the identifier with it"):
            check(base, f"{LONG} [V]")
        with pytest.raises(InputError, match="the identifier with it"):
            make_plan(config(f"prompts.instance='{LONG}{{identifier}} {{class_noun}}'"))

    def test_are_sampled_as_by_the_plain_pipeline(self, base: Path) -> None:
        settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": SIDE, "width": SIDE}
        pipeline, plain = load_pipeline(base), plain_pipeline(base)
        prompts = [f"{LONG}car", f"{LONG}beach"]  # alike but for what CLIP cuts off
        found = sample(pipeline, prompts, [1, 1], dtype=torch.float32, **settings)
        generators = [torch.Generator().manual_seed(1) for _ in prompts]
        expected = plain(prompts, generator=generators, **settings).images
        for mine, other in zip(found, expected, strict=True):
            assert abs(np.asarray(mine, dtype=int) - np.asarray(other, dtype=int)).max() <= 1
        assert found[0].tobytes() != found[1].tobytes()

    @pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
    def test_are_served_by_mlflow(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        multiplies_bf16(monkeypatch, False)
        tokens = max(reader.length for reader in text_readers(base))
        served = Served(base, tokens=tokens)
        settings = {"seed": 0, "num_inference_steps": 1, "guidance_scale": 1.0, "height": SIDE, "width": SIDE}
        assert len(served.pictures([f"[V] {LONG}"], **settings)) == 1
        with pytest.raises(MlflowException, match=f"the model reads {tokens}: .* is cut off; shorten it"):
            served.pictures([f"[V] {TOO_LONG}"], **settings)
        with pytest.raises(MlflowException, match=r"the model reads 77: .* the identifier with it; shorten it"):
            served.pictures([f"{LONG}[V]"], **settings)
