"""A cascade through the whole job: its worker killed in both stages and between, its pictures everywhere, ZeRO-3."""

import base64
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from replicas import cascade
from striking import FOUR_CPUS, after_step, at_start_of, struck, trained_calmly

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.sampling.sampler import load_pipeline, sample
from pipelines.apps.evaluate_model import evaluate_model
from pipelines.apps.generate import generate
from pipelines.apps.serve.requests import Asked, Drawn
from pipelines.apps.serve.sampler import SubjectSampler
from pipelines.apps.serve.subjects import find_subjects
from pipelines.driver.console import RunConsole
from pipelines.driver.personalize import personalize
from pipelines.driver.train_stage import find_result
from pipelines.plan.run_plan import make_plan
from pipelines.storage.files import read_bytes, read_json
from pipelines.storage.publications import read_manifest
from pipelines.tracking.client import connect, default_tracking, quietly
from pipelines.worker.publish import published_weights

pytestmark = pytest.mark.recovery
FIRST, SECOND, EVERY, SCORES = 90, 90, 20, [40, 80, 90]
LARGE = "super_resolution"
MODEL = "models:/dreambooth-rex@latest"
PROMPT = "a photo of [V] dog on the beach"
SAMPLING: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture
def config(tmp_path: Path, tracking_in: Callable[[Path], str]) -> DreamBoothConfig:
    torch.manual_seed(0)
    small, large = cascade.build(tmp_path / "bases")
    photographs = tmp_path / "rex"
    photographs.mkdir()
    for place in range(2):
        Image.effect_noise((96, 80), 80).convert("RGB").save(photographs / f"{place}.png")
    prompts = ["a photo of [V] {class_noun}", "[V] {class_noun} at night"]
    return load_config(
        {
            "base_model": str(small),
            "super_resolution": {"base_model": str(large), "max_train_steps": SECOND, "learning_rate": 1e-3},
            "subject": {"name": "rex", "class_noun": "dog", "identifier": "sks", "instance_images": str(photographs)},
            "prior": {"num_class_images": 2, "num_inference_steps": 2},
            "train": {
                "max_train_steps": FIRST,
                "learning_rate": 1e-3,
                "checkpoint_every": EVERY,
                "keep": "best",
            },
            "cluster": {"max_failures": 3},
            "storage": {"run": str(tmp_path / "run"), "prior": str(tmp_path / "prior")},
            "tracking": {"uri": tracking_in(tmp_path)},
            "evaluation": {
                "protocol": "own",
                "bank": "miniature",
                "image_encoder": "miniature",
                "prompts": prompts,
                "images_per_prompt": 1,
                "num_inference_steps": 2,
                "every": SCORES[0],
                "score_images": 1,
            },
        }
    )


def pixels(picture: Any) -> Any:
    return np.asarray(picture, dtype=int)


def opened(png: bytes) -> Any:
    return pixels(Image.open(io.BytesIO(png)))


@pytest.mark.usefixtures("ray_session")
def test_a_struck_cascade_ends_as_one_model_with_the_same_picture_everywhere(
    config: DreamBoothConfig, tmp_path: Path
) -> None:
    console, uri = RunConsole(quiet=True), str(config.tracking.uri)
    with struck(after_step(2 * EVERY), at_start_of(LARGE), after_step(2 * EVERY, stage=LARGE)) as starts:
        summary = personalize(config, console).summary
    plan = make_plan(config, FOUR_CPUS)
    result = find_result(plan)
    assert result is not None
    assert result.second is not None
    began = [(message.get("stage"), message["start"]) for message in starts]
    _, (_, inside), _, _, (_, between), _, _ = began
    assert inside in range(EVERY, FIRST, EVERY)
    assert between in range(0, SECOND, EVERY)  # a few steps may be made before the kill
    both = [(None, 0), (None, inside), (LARGE, 0), (None, FIRST), (LARGE, between), (None, FIRST)]
    assert began == [*both, (LARGE, result.second.resumed_from)]
    assert result.second.resumed_from in range(EVERY, SECOND, EVERY)
    assert (result.resumed_from, result.steps, result.second.steps) == (FIRST, FIRST, SECOND)
    assert not list(Path(config.run_uri, "checkpoints").iterdir())

    calm = trained_calmly(plan.config, tmp_path / "calm")
    assert [one["loss"] for one in result.history] == [one["loss"] for one in calm[0].tuned.record["history"]]
    assert [one["loss"] for one in result.second.history] == [one["loss"] for one in calm[1].tuned.record["history"]]
    for found, stage, said in zip((result, result.second), calm, (summary, summary[LARGE]), strict=True):
        assert [score["step"] for score in found.scores] == SCORES
        assert [*found.scores] == stage.tuned.record["scores"] == said["scores"]
        assert found.exported_step == stage.tuned.record["exported_step"] == said["exported_step"]
    assert (
        "Similarity over steps of the super-resolution stage, measured 3 times" in Path(summary["report"]).read_text()
    )

    model = Path(summary["model_uri"])
    assert [folder.name for folder in Path(config.run_uri, "model").iterdir()] == [model.name]
    pipeline = load_pipeline(model)
    for name, parameter in published_weights(calm).items():
        of = pipeline.super_resolution if name.startswith("super_resolution.") else pipeline
        name = name.removeprefix("super_resolution.")
        assert torch.equal(of.unet.get_parameter(name.removeprefix("denoiser.")), parameter.float()), name

    [expected] = [pixels(p) for p in sample(pipeline, [PROMPT.replace("[V]", "sks")], [7], **SAMPLING)]
    assert expected.shape == (64, 64, 3)
    registry = config.registry.model_copy(update={"storage": "delta"})
    assert personalize(config.model_copy(update={"registry": registry}), console).summary["version"] == 2
    settings = {"num": 1, "seed": 7, "output": str(tmp_path / "pictures"), "tracking_uri": uri, **SAMPLING}
    for address, off in ((str(model), 0), ("models:/dreambooth-rex/1", 1), ("models:/dreambooth-rex/2", 1)):
        [path] = generate(address, PROMPT, **settings).paths
        with Image.open(path) as picture:
            assert abs(pixels(picture) - expected).max() <= off, address
    with quietly(), default_tracking(uri):
        from mlflow import pyfunc

        served = pyfunc.load_model(MODEL)
        answer = served.predict(pd.DataFrame({"prompt": [PROMPT]}), params={"seed": 7, **SAMPLING})
    assert abs(opened(base64.b64decode(answer["image"][0])) - expected).max() <= 1
    subjects = find_subjects(MODEL, uri)
    for base_shared in (True, False):
        sampler = SubjectSampler(subjects, uri, base_shared=base_shared, device="cpu")
        [drawn] = sampler.sample(sampler.load("rex"), [Asked(subject="rex", prompt=PROMPT, seed=7, **SAMPLING)])
        assert isinstance(drawn, Drawn)
        assert abs(opened(drawn.images[0]) - expected).max() == 0

    record = read_json(summary["samples"]["uri"])
    [address], prompt = record["pictures"][0]["fine_tuned"], record["pictures"][0]["prompt"]
    assert plan.samples is not None
    own = {"num_inference_steps": 2, "guidance_scale": plan.config.evaluation.guidance_scale}
    dtype = getattr(torch, plan.sampling_dtype)
    [drawn_again] = sample(pipeline, [prompt], plan.samples.fine_tuned_sets[0].seeds[:1], dtype=dtype, **own)
    assert abs(opened(read_bytes(address)) - pixels(drawn_again)).max() <= 1
    assert {opened(read_bytes(one)).shape for one in record["photographs"]} == {(64, 64, 3)}

    recorded = read_json(summary["evaluation"]["uri"])
    shutil.rmtree(Path(config.run_uri, "evaluations"))
    shutil.rmtree(Path(config.prior_uri, "base-samples"))
    overrides = (
        "evaluation.bank=miniature",
        "evaluation.images_per_prompt=1",
        f"evaluation.prompts={[*config.evaluation.prompts]}",
    )
    again = evaluate_model(
        MODEL,
        str(tmp_path / "rex"),
        overrides=(*overrides, "evaluation.protocol=own"),
        tracking_uri=uri,
        console=console,
    )
    assert again.uri == summary["evaluation"]["uri"]
    for name, figure in recorded["figures"].items():
        assert again.evaluation["figures"][name]["mean"] == pytest.approx(figure["mean"], abs=1e-5), name

    client = connect(uri)
    with quietly():
        run = client.get_run(summary["mlflow"]["run_id"])
        version = client.get_model_version("dreambooth-rex", "1")
        for curve, steps in (
            ("train/loss", range(1, FIRST + 1)),
            ("super_resolution/loss", range(1, SECOND + 1)),
            ("score/dino", SCORES),
            ("super_resolution/score/dino", SCORES),
        ):
            points = client.get_metric_history(run.info.run_id, curve)
            assert {point.step for point in points} == set(steps), curve
    assert (
        version.tags["super_resolution.base_hash"]
        == read_manifest(str(model)).metadata["super_resolution"]["base_hash"]
    )


@pytest.mark.usefixtures("ray_session")
def test_both_stages_have_one_loss_curve_with_zero_3_on_two_workers(config: DreamBoothConfig, tmp_path: Path) -> None:
    steps = {"max_train_steps": 4}
    short = config.model_copy(
        update={
            "train": config.train.model_copy(update=steps),
            "super_resolution": config.super_resolution.model_copy(update=steps),
            "evaluation": config.evaluation.model_copy(update={"enabled": False, "protocol": "none"}),
        }
    )
    sharded = {
        "cluster": config.cluster.model_copy(update={"num_workers": 2}),
        "zero": config.zero.model_copy(update={"stage": 3}),
    }
    plan = make_plan(short.model_copy(update=sharded), FOUR_CPUS)
    assert (plan.engine, plan.zero_stage) == ("deepspeed", 3)
    summary = personalize(plan.config, RunConsole(quiet=True)).summary
    result = find_result(plan)
    assert result is not None
    assert result.second is not None
    alone = short.model_copy(update={"train": short.train.model_copy(update={"gradient_accumulation_steps": 2})})
    calm = trained_calmly(make_plan(alone, FOUR_CPUS).config, tmp_path / "calm")
    for found, expected in zip((result, result.second), calm, strict=True):
        losses = [step["loss"] for step in expected.tuned.record["history"]]
        assert len(set(losses)) == len(losses) == steps["max_train_steps"]
        assert [step["loss"] for step in found.history] == pytest.approx(losses, rel=2e-4)
    assert load_pipeline(Path(summary["model_uri"])).super_resolution is not None
