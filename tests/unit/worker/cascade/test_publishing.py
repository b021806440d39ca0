"""Both stages of a cascade are published as one, sampled, exported and restored from a delta."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cascade_stages import FIRST, SECOND, assert_same, losses, trained
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.delta import rebuild, write_delta
from dreambooth.models.weight_files import weight_files
from dreambooth.sampling.sampler import load_pipeline, sample
from pipelines.cli import main
from pipelines.driver.train_stage import find_result, train_task
from pipelines.plan.run_plan import Plan
from pipelines.storage.files import join, read_json
from pipelines.storage.publications import Manifest, read_manifest
from pipelines.tasks import SampleRequest, Source
from pipelines.worker.publish import TrainedStage, publish_result, published_weights
from pipelines.worker.samplers import ImageSampler

PROMPTS = ("a photo of sks dog", "a photo of a dog")


@pytest.fixture(scope="module")
def model(calm: tuple[Plan, list[TrainedStage]]) -> Manifest:
    return publish_result(calm[1])


def test_both_are_published_once_with_one_manifest(calm: tuple[Plan, list[TrainedStage]], model: Manifest) -> None:
    plan, _ = calm
    assert plan.second is not None
    [folder] = Path(plan.config.run_uri, "model").iterdir()
    assert str(folder) == model.uri
    assert {"unet/diffusion_pytorch_model.safetensors", "super_resolution/model_index.json"} <= model.files.keys()
    metadata = read_manifest(model.uri).metadata
    assert (metadata["key"], metadata["base_hash"], metadata["step"]) == (plan.key, plan.base.hash, FIRST)
    assert metadata["super_resolution"] == {
        "base_model": plan.second.config.base_model,
        "base_hash": plan.second.base.hash,
        "resolution": 64,
        "step": SECOND,
        "ema_decay": plan.second.config.train.ema_decay,
    }


def sampled(sampler: ImageSampler, source: Source) -> list[Image.Image]:
    request = SampleRequest(
        prompts=PROMPTS, seeds=(3, 4), num_inference_steps=2, guidance_scale=3.0, resolution=16, dtype="float32"
    )
    return [Image.open(io.BytesIO(picture)) for picture in sampler.samples(source, request)]


def same(some: list[Image.Image], others: list[Image.Image]) -> bool:
    return all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(some, others, strict=True))


def test_an_evaluation_sees_the_same_pictures_before_and_after_publishing(
    calm: tuple[Plan, list[TrainedStage]], model: Manifest
) -> None:
    plan, stages = calm
    task, sampler = train_task(plan, None), ImageSampler(use_gpu=False)
    base = sampled(sampler, task.base)
    in_memory = Source(address="trained:rex")
    sampler.give_weights(in_memory, task.base, published_weights(stages))
    before = sampled(sampler, in_memory)
    assert [picture.size for picture in [*base, *before]] == [(64, 64)] * 4
    assert same(sampled(sampler, task.base), base)  # its own weights are back, in both stages
    assert same(sampled(sampler, Source(address=model.uri, published=True)), before)
    pipeline = load_pipeline(Path(model.uri))
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "dtype": torch.float32}
    assert same(sample(pipeline, PROMPTS, [3, 4], **settings), before)
    assert not same(base, before)
    small = load_pipeline(resolve_base_model(plan.config.base_model).directory, alone=True)
    assert sample(small, PROMPTS[:1], [3], **settings)[0].size == (16, 16)


def test_another_noise_of_the_small_picture_is_published_and_sampled(
    calm: tuple[Plan, list[TrainedStage]], make: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = make(tmp_path, "super_resolution.noise_levels=40")
    first, second = trained(plan)
    assert_same(first, calm[1][0])
    assert losses(second) != losses(calm[1][1])
    model, task, sampler = publish_result([first, second]), train_task(plan, None), ImageSampler(use_gpu=False)
    noising = read_json(join(model.uri, "super_resolution", "image_noising_scheduler", "scheduler_config.json"))
    assert noising["_levels"] == 40
    base, in_memory = sampled(sampler, task.base), Source(address="trained:rex")
    sampler.give_weights(in_memory, task.tuned_base, published_weights([first, second]))
    before = sampled(sampler, in_memory)
    assert same(sampled(sampler, Source(address=model.uri, published=True)), before)
    assert same(sampled(sampler, task.base), base)  # at the base's own level
    assert same(sampled(sampler, train_task(calm[0], None).base), base)
    sampler.give_weights(in_memory, task.base, published_weights([first, second]))
    assert not same(sampled(sampler, in_memory), before)
    write_delta(plan.base, Path(model.uri), tmp_path / "delta", None if plan.second is None else plan.second.base)
    rebuilt = rebuild(tmp_path / "delta", tmp_path / "rebuilt")
    assert all((rebuilt / name).read_bytes() == Path(model.uri, name).read_bytes() for name in model.files)


def test_a_second_stage_of_no_steps_is_published_as_it_was(
    calm: tuple[Plan, list[TrainedStage]], make: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = make(tmp_path, "super_resolution.max_train_steps=0", "train.lr_warmup_steps=0")
    first, second = trained(plan)
    assert_same(first, calm[1][0])
    publish_result([first, second])
    result = find_result(plan)
    assert result is not None
    assert result.second is not None
    assert (result.second.steps, result.second.history, result.seconds > 0) == (0, (), True)
    assert plan.second is not None
    [path] = weight_files(plan.second.base.directory, plan.second.base.family.denoiser)
    weights = load_file(path)
    published = load_file(Path(result.model.uri, "super_resolution", "unet", "diffusion_pytorch_model.safetensors"))
    assert published.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name].to(tensor.dtype)) for name, tensor in published.items())


def test_a_delta_is_exact_and_small(calm: tuple[Plan, list[TrainedStage]], model: Manifest, tmp_path: Path) -> None:
    plan, directory = calm[0], Path(model.uri)
    assert plan.second is not None
    write_delta(plan.base, directory, tmp_path / "delta", plan.second.base)
    rebuilt = rebuild(tmp_path / "delta", tmp_path / "rebuilt")
    for name in model.files:
        assert (rebuilt / name).read_bytes() == (directory / name).read_bytes(), name
    kept = {path.relative_to(tmp_path / "delta").as_posix() for path in (tmp_path / "delta").rglob("*")}
    assert "super_resolution/text_encoder" not in kept  # the base's own
    assert "manifest.json" not in kept  # which a registered version doesn't hold
    assert not (rebuilt / "manifest.json").exists()
    weights = Path("super_resolution", "unet", "diffusion_pytorch_model.safetensors")
    assert Path(tmp_path, "delta", weights).stat().st_size < Path(directory, weights).stat().st_size


def test_the_last_steps_weights_are_kept_beside_the_average_and_exported(
    make: Callable[..., Plan], calm: tuple[Plan, list[TrainedStage]], tmp_path: Path
) -> None:
    averaged, plain = make(tmp_path / "a", "train.keep_unaveraged=true"), make(tmp_path / "p", "train.ema_decay=null")
    assert averaged.key != calm[0].key  # a result without them isn't taken for one with them
    models = [publish_result(trained(plan)) for plan in (averaged, plain)]
    assert [model.metadata["ema_decay"] for model in models] == [0.5, None]
    found = {}
    for name, model, average in (
        ("ema", models[0], "--ema"),
        ("no-ema", models[0], "--no-ema"),
        ("plain", models[1], "--no-ema"),
    ):
        to = tmp_path / name
        result = CliRunner().invoke(
            main, ["export", model.uri, "--format", "diffusers", "--to", str(to), average, "--quiet"]
        )
        assert result.exit_code == 0, result.output
        found[name] = {
            path.relative_to(to): path.read_bytes() for path in to.rglob("*.safetensors") if "unet" in path.parts
        }
        assert "moving average, decay" not in (to / "README.md").read_text() or name == "ema"
    assert len(found["plain"]) == 2
    assert found["no-ema"] == found["plain"]
    assert all(found["ema"][path] != content for path, content in found["plain"].items())
