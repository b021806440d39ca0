"""Both stages of a cascade in a lane's hands: trained, struck, gone on with, scored, reported."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cascade_stages import FIRST, SCORED, SECOND, Killed, assert_same, losses, trained
from PIL import Image

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.evaluation.banks import load_bank
from dreambooth.evaluation.metrics import clip_t
from dreambooth.evaluation.prompts import sample_seed
from dreambooth.evaluation.similarity import mean_pairwise_similarity
from pipelines.driver.train_stage import find_result, train_task
from pipelines.plan.run_plan import Plan
from pipelines.stages.photographs import read_photographs
from pipelines.tasks import SampleRequest, Source
from pipelines.worker.lane_reports import Reports
from pipelines.worker.publish import TrainedStage, publish_result, published_weights
from pipelines.worker.samplers import ImageSampler


@pytest.mark.parametrize(
    ("strikes", "resumed"),
    [
        ([(0, 3)], [2, 0]),
        ([(1, 1)], [FIRST, 0]),
        ([(1, 4)], [FIRST, 2]),
        ([(0, 3), (1, 3), (1, 5)], [FIRST, 4]),
    ],
)
def test_a_struck_cascade_ends_as_if_nothing_had_happened(
    calm: tuple[Plan, list[TrainedStage]],
    make: Callable[..., Plan],
    tmp_path: Path,
    strikes: list[tuple[int, int]],
    resumed: list[int],
) -> None:
    plan = make(tmp_path)
    assert plan.key == calm[0].key
    for strike in strikes:
        with pytest.raises(Killed):
            trained(plan, until=strike)
    found = trained(plan)
    assert [stage.tuned.record["resumed_from"] for stage in found] == resumed
    for one, other in zip(found, calm[1], strict=True):
        assert_same(one, other)
    publish_result(found)
    result = find_result(plan)
    assert result is not None
    assert result.second is not None
    assert result.seconds > 0
    assert (result.steps, result.second.steps) == (FIRST, SECOND)


def test_scores_of_the_second_stage_are_those_of_the_cascades_pictures_and_change_nothing(
    calm: tuple[Plan, list[TrainedStage]], make: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = make(tmp_path, *SCORED)
    task, found = train_task(plan, None), trained(plan)
    for one, other in zip(found, calm[1], strict=True):
        assert_same(one, other)
    first, second = (stage.tuned.record["scores"] for stage in found)
    assert [score["step"] for score in first] == [2, 3]
    assert [score["step"] for score in second] == [2, 4, 5]
    sampler, source = ImageSampler(use_gpu=False), Source(address="trained:rex")
    sampler.give_weights(source, task.tuned_base, published_weights(found))
    settings = plan.config.evaluation
    prompts = [prompt for prompt in settings.prompts_of(plan.config.subject, plan.config.prompts) for _ in range(2)]
    request = SampleRequest(
        prompts=tuple(prompts),
        seeds=tuple(sample_seed(settings.seed, prompt, place % 2) for place, prompt in enumerate(prompts)),
        num_inference_steps=2,
        guidance_scale=settings.guidance_scale,
        resolution=16,
        dtype=plan.sampling_dtype,
    )
    bank = load_bank("miniature")
    seen = bank.embed_images([Image.open(io.BytesIO(one)) for one in sampler.samples(source, request)])
    real = [Image.open(io.BytesIO(one)) for one in read_photographs(plan.config, plan.images, 64).squares]
    similarity = mean_pairwise_similarity(seen.dino, bank.embed_images(real).dino)
    assert second[-1]["dino"] == pytest.approx(similarity, abs=1e-6)
    assert second[-1]["clip_t"] == pytest.approx(clip_t(seen.clip, bank.embed_texts(prompts)), abs=1e-6)


def test_the_second_stages_best_weights_are_published_and_a_resume_is_exact(
    make: Callable[..., Plan], tmp_path: Path
) -> None:
    best = (*SCORED, "train.keep=best", "evaluation.score_images=1")
    whole, struck = make(tmp_path / "whole", *best), make(tmp_path / "struck", *best)
    expected = trained(whole)
    scores = {int(score["step"]): score["score"] for score in expected[1].tuned.record["scores"]}
    step = max(scores, key=lambda step: scores[step])
    assert expected[1].tuned.record["exported_step"] == step
    with pytest.raises(Killed):
        trained(struck, until=(1, SECOND))
    found = trained(struck)
    assert [stage.tuned.record["resumed_from"] for stage in found] == [FIRST, 4]
    for name in ("scores", "exported_step"):
        assert [one.tuned.record[name] for one in found] == [one.tuned.record[name] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    model = publish_result(found)
    assert model.metadata["super_resolution"]["step"] == step
    result = find_result(struck)
    assert result is not None
    assert result.second is not None
    assert (result.second.exported_step, len(result.second.scores)) == (step, 3)
    # What is published is what a training of as many steps ends with.
    shorter = make(tmp_path / "shorter", f"super_resolution.max_train_steps={step}")
    state, ended = found[1].tuned.state, trained(shorter)[1].tuned.state
    assert [name for name, tensor in state.items() if not torch.equal(tensor, ended[name])] == []


def test_a_stage_that_ended_early_is_not_trained_on(
    calm: tuple[Plan, list[TrainedStage]], make: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.worker.fidelity.FidelityScorer", Falling)
    plan = make(tmp_path, "evaluation.every=1", "train.stop_after=1", "evaluation.bank=miniature")
    with pytest.raises(Killed):
        trained(plan, until=(1, 2))
    for stage, other in zip(trained(plan), calm[1], strict=True):
        assert stage.tuned.record["steps"] == 2
        assert losses(stage) == losses(other)[:2]
    assert trained(plan)[0].tuned.record["resumed_from"] == 2


class Falling:
    """Scores that fall: the second one ends the training."""

    def __init__(self, config: DreamBoothConfig, images: Any, **of_the_run: Any) -> None:
        pass

    def score(self, step: int, state: dict[str, Any]) -> Any:
        from dreambooth.training.best_checkpoint import Score

        return Score(step=step, dino=-step, clip_t=0.0)


def test_without_a_second_stage_no_checkpoint_is_added(make: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make(tmp_path, "super_resolution.base_model=null", "train.checkpoint_every=100")
    assert plan.stages == (plan,)
    [alone] = trained(plan)
    assert losses(alone)
    assert not Path(plan.config.run_uri, "checkpoints").exists()


def test_steps_of_the_second_stage_count_after_those_of_the_first(calm: tuple[Plan, list[TrainedStage]]) -> None:
    sent: list[Any] = []

    class Queue:
        def start(self, method: str, name: str, progress: Any, messages: Any) -> None:
            sent.append(progress)

    queue: Any = Queue()
    reports = Reports(queue, train_task(calm[0], None), 0.0)
    metrics = {"images_per_second": 1.0, "loss": 1.0}
    for message in (
        {"kind": "phase", "phase": "training", "start": 1},
        {"kind": "step", "metrics": metrics | {"step": 3}},
        {"kind": "phase", "phase": "training", "start": 2, "stage": "super_resolution"},
        {"kind": "step", "metrics": metrics | {"step": 4}, "stage": "super_resolution"},
    ):
        reports.report(message)
    assert [(progress.step, progress.steps) for progress in sent] == [(1, 8), (3, 8), (5, 8), (7, 8)]
