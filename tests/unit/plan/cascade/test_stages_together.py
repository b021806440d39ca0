"""Stages of a cascade that go together, and a sentence about those that don't."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dreambooth.config.settings import load_config
from dreambooth.errors import InputError
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.run_plan import Plan
from pipelines.plan.subject_checks import check_subjects
from pipelines.plan.subject_list import ListedSubject

RESOURCES = Resources(cpus=2, gpus=0)


@pytest.fixture
def other(bases: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the second stage, to be changed."""
    return shutil.copytree(bases[1], tmp_path / "other")


@pytest.mark.parametrize("levels", ["0", "1001", "few"])
def test_impossible_noise_levels_are_refused(planned: Callable[..., Plan], levels: str) -> None:
    with pytest.raises(InputError, match=r"super_resolution\.noise_levels"):
        planned(f"super_resolution.noise_levels={levels}")


def test_more_levels_than_the_second_stages_timesteps_are_refused(planned: Callable[..., Plan], other: Path) -> None:
    path = other / "image_noising_scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": 500}))
    with pytest.raises(InputError, match=r"noise_levels is 501, but image_noising_scheduler .* has 500 timesteps"):
        planned(f"super_resolution.base_model={other}", "super_resolution.noise_levels=501")


def _another_width(base: Path) -> None:
    path = base / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_model": 64}))


def _another_vocabulary(base: Path) -> None:
    path = base / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_ids": 0, "additional_special_tokens": ["<a>"]}))


def _other_weights(base: Path) -> None:
    path = base / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in sorted(weights) if name.endswith("wo.weight"))
    save_file(weights | {name: weights[name] * 1.001}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (_another_width, r"d_model in text_encoder/config\.json is 48 and 64"),
        (_another_vocabulary, "their vocabularies differ"),
        (_other_weights, r"wo\.weight in text_encoder has other weights"),
    ],
)
def test_stages_that_read_prompts_by_different_text_encoders_are_refused(
    planned: Callable[..., Plan],
    other: Path,
    change: Callable[[Path], None],
    difference: str,
) -> None:
    change(other)
    with pytest.raises(InputError, match=rf"don't read prompts alike: .*{difference}\. Both stages are sampled"):
        planned(f"super_resolution.base_model={other}", weights=change is not _another_width)


def test_weights_in_half_precision_are_the_same_text_encoder(planned: Callable[..., Plan], other: Path) -> None:
    path = other / "text_encoder" / "model.safetensors"
    save_file({name: weight.half() for name, weight in load_file(path).items()}, path, {"format": "pt"})
    assert planned(f"super_resolution.base_model={other}").second is not None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("super_resolution.resolution=128",),
            "super_resolution.resolution is 128 and images.resolution 16, but .* 64",
        ),
        (("images.resolution=32",), "super_resolution.resolution is 64 and images.resolution 32, .* expected 128"),
        (
            ("train.method=textual_inversion",),
            "train.method textual_inversion trains an embedding of text_encoder alone",
        ),
        (("train.text_encoders=all",), "train.text_encoders trains text_encoder, which both stages"),
        (("super_resolution.base_model=miniature",), r"super_resolution\.base_model 'miniature' is Stable Diffusion"),
        (
            ("super_resolution.base_model=nowhere/at/all",),
            r"^super_resolution\.base_model 'nowhere/at/all': expected 'miniature-cascade', a folder",
        ),
        (
            ("super_resolution.max_train_steps=2", "train.lr_warmup_steps=2"),
            "train.lr_warmup_steps is 2, and holds for",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    planned: Callable[..., Plan], overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        planned(*overrides)


def test_a_second_stage_that_reads_no_text_leaves_the_first_ones_text_encoder_to_be_trained(
    planned: Callable[..., Plan], other: Path
) -> None:
    path = other / "unet" / "config.json"
    config = json.loads(path.read_text())
    asked = (f"super_resolution.base_model={other}", "train.text_encoders=all")
    without = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3, "mid_block_type": None}
    path.write_text(json.dumps(config | without))
    with pytest.raises(InputError, match="trains text_encoder, which both stages of a cascade read prompts with"):
        planned(*asked)  # by addition_embed_type
    path.write_text(json.dumps(config | without | {"addition_embed_type": None}))
    plan = planned(*asked)
    assert plan.second is not None
    assert plan.run_text_encoders == ("text_encoder",)
    assert plan.second.run_text_encoders == ()
    with pytest.raises(InputError, match=r"train\.method textual_inversion"):
        planned(*asked, "train.method=textual_inversion")


def test_another_side_is_that_of_both(planned: Callable[..., Plan]) -> None:
    assert planned("images.resolution=24", "super_resolution.resolution=96").config.picture_side == 96
    with pytest.raises(InputError, match=r"is 100 x 100 pixels, but super_resolution\.resolution is 128;"):
        planned("images.resolution=32", "super_resolution.resolution=128")


def test_a_base_of_another_family_has_no_second_stage(planned: Callable[..., Plan]) -> None:
    with pytest.raises(
        InputError, match="their text encoders are text_encoder CLIPTextModel and text_encoder T5Encoder"
    ):
        planned("base_model=miniature", "images.resolution=16", "super_resolution.resolution=64")


def test_a_batch_finds_the_second_stage_once_and_names_its_fault(
    settings: dict[str, Any], bases: tuple[Path, Path]
) -> None:
    config = load_config(settings)
    wrong = load_config(settings, ("subject.name=tim", f"super_resolution.base_model={bases[0]}"))
    other = load_config(settings, ("subject.name=max", "subject.identifier=tfz"))
    checks = check_subjects(
        [ListedSubject(name=one.subject.name, config=one) for one in (config, wrong, other)], RESOURCES
    )
    assert [check.plan is not None and check.plan.second is not None for check in checks] == [True, False, True]
    assert "expected a model that scales up pictures" in checks[1].errors[0]
    identifiers = [check.plan.config.subject.identifier for check in checks if check.plan is not None]
    assert identifiers == ["sks", "tfz"]
    seconds = [check.plan.second for check in checks if check.plan is not None]
    assert [second.config.subject.identifier for second in seconds if second is not None] == identifiers
