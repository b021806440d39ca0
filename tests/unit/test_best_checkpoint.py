"""Which weights are exported, when a training ends early, and that a resume changes neither."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreambooth.base_model import resolve_base_model
from dreambooth.best_checkpoint import Score, Scores
from dreambooth.config import load_config
from dreambooth.errors import Diverged, InputError
from dreambooth.model import load_model
from pipelines.cluster import Resources
from pipelines.fine_tune import FineTuned, History, fine_tune
from pipelines.plan import make_plan
from pipelines.train_stage import train_task


class FakeEngine:
    """Weights that say which step they are of."""

    step = 0

    def state_dict(self) -> dict[str, Tensor]:
        return {"weight": torch.tensor([float(self.step)])}


def measured(*scores: float) -> tuple[Scores, FakeEngine]:
    """Scores that were measured every 10 steps, their weights kept."""
    kept, engine = Scores(), FakeEngine()
    for place, score in enumerate(scores):
        engine.step = 10 * (place + 1)
        kept.add(Score(step=engine.step, dino=score - 0.25, clip_t=0.25), engine.state_dict)
    return kept, engine


def weights_of(scores: Scores) -> float:
    assert scores.weights is not None
    return float(scores.weights["weight"])


class TestScores:
    @pytest.mark.parametrize(
        ("scores", "best"),
        [((0.5,), 10), ((0.5, 0.75), 20), ((0.5, 0.75, 0.625), 20), ((0.75, 0.75), 10), ((-1.0, -2.0), 10)],
    )
    def test_the_weights_of_the_highest_are_kept_and_the_earlier_of_equals(
        self, scores: tuple[float, ...], best: int
    ) -> None:
        kept, _ = measured(*scores)
        assert kept.best is not None
        assert (kept.best.step, weights_of(kept)) == (best, best)

    def test_they_are_what_they_were_when_they_were_measured(self) -> None:
        kept, engine = measured(0.5, 0.25)
        engine.step = 30
        assert weights_of(kept) == 10

    def test_weights_are_not_asked_for_in_vain(self) -> None:
        kept, _ = measured(0.5)
        kept.add(Score(step=20, dino=0.1, clip_t=0.1), lambda: pytest.fail("not the best"))
        kept.add(Score(step=30, dino=0.9, clip_t=0.9))
        assert weights_of(kept) == 10

    @pytest.mark.parametrize(
        ("scores", "since"), [((), 0), ((0.5,), 0), ((0.5, 0.25), 1), ((0.5, 0.5, 0.5), 2), ((0.5, 0.25, 0.75), 0)]
    )
    def test_when_it_ends(self, scores: tuple[float, ...], since: int) -> None:
        kept, _ = measured(*scores)
        assert kept.since_best == since
        assert kept.ends(since + 1) is False
        assert kept.ends(None) is False
        assert not since or kept.ends(since)

    def test_dino_and_clip_t_count_alike(self) -> None:
        copies, follows = Score(step=1, dino=0.9, clip_t=0.2), Score(step=2, dino=0.8, clip_t=0.31)
        assert follows.score > copies.score

    def test_a_step_is_measured_once(self) -> None:
        kept, _ = measured(0.5, 0.75)
        with pytest.raises(ValueError, match="step 20 was measured already"):
            kept.add(Score(step=20, dino=0, clip_t=0))

    def test_they_go_with_a_checkpoint(self, tmp_path: Path) -> None:
        kept, _ = measured(0.5, 0.75, 0.1)
        History(step=30, metrics=[{"step": 30.0}], scores=kept).save(tmp_path)
        again = History.load(tmp_path)
        assert again.scores.measured == kept.measured
        assert weights_of(again.scores) == 20
        assert (again.step, again.metrics) == (30, [{"step": 30.0}])

    def test_a_checkpoint_without_scores(self, tmp_path: Path) -> None:
        History(step=3).save(tmp_path)
        assert History.load(tmp_path).scores == Scores()


class Folders:
    """Checkpoints in folders, one a step."""

    def __init__(self, root: Path, start: int = 0) -> None:
        self._root, self._start = root, start

    def restore(self, engine: Any) -> History:
        folder = self._root / str(self._start)
        if not self._start:
            return History()
        engine.load(folder)
        return History.load(folder)

    def save(self, engine: Any, history: History) -> None:
        folder = self._root / str(history.step)
        folder.mkdir()
        engine.save(folder)
        history.save(folder)


class TestFineTuning:
    """Real training and real scores, of a tiny base model."""

    @pytest.fixture
    def tune(self, tiny_pipeline: Path, instance_folder: Path, tmp_path: Path) -> Any:
        def run(*overrides: str, start: int = 0) -> FineTuned:
            plain: dict[str, Any] = {
                "base_model": str(tiny_pipeline),
                "subject": {
                    "name": "rex",
                    "class_noun": "dog",
                    "identifier": "tfz",
                    "instance_images": str(instance_folder),
                },
                "prior": {"prior_loss_weight": 0},
                "train": {"max_train_steps": 6, "learning_rate": 1e-2, "checkpoint_every": 3},
                "evaluation": {
                    "every": 2,
                    "bank": "miniature",
                    "prompts": ["a photo of [V] {class_noun}", "[V] {class_noun} at night"],
                    "num_inference_steps": 2,
                    "score_images": 1,
                },
                "storage": {"root": str(tmp_path / "output")},
            }
            plan = make_plan(load_config(plain, overrides), Resources(cpus=2, gpus=0))
            base = resolve_base_model(plan.config.base_model, None)
            model = load_model(base.directory, plan.config, autocast=False)
            return fine_tune(train_task(plan, None), base, model, "cpu", Folders(tmp_path, start), lambda message: None)

        return run

    def test_looking_changes_nothing(self, tune: Any) -> None:
        looked, blind = tune("train.checkpoint_every=100"), tune("train.checkpoint_every=100", "evaluation.every=null")
        assert [score["step"] for score in looked.record["scores"]] == [2, 4, 6]
        assert blind.record["scores"] == []
        assert_same(looked.state, blind.state)

    def test_best_is_exported_and_a_resume_is_exact(self, tune: Any) -> None:
        whole = tune("train.keep=best")
        scores = {int(score["step"]): score["score"] for score in whole.record["scores"]}
        best = max(scores, key=lambda step: scores[step])
        assert whole.record["exported_step"] == best
        # What is exported is what a training of as many steps ends with.
        assert_same(whole.state, tune(f"train.max_train_steps={best}", "train.checkpoint_every=100").state)
        resumed = tune("train.keep=best", start=3)
        assert resumed.record["resumed_from"] == 3
        assert resumed.record["scores"] == whole.record["scores"]
        assert resumed.record["exported_step"] == best
        assert_same(resumed.state, whole.state)

    def test_it_ends_early_and_does_so_again_after_a_resume(self, tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        falling = {2: 0.5, 4: 0.4, 6: 0.3, 8: 0.9}
        monkeypatch.setattr(
            "pipelines.fidelity.FidelityScorer.score",
            lambda self, step, state: Score(step=step, dino=falling[step], clip_t=0),
        )
        settings = ("train.keep=best", "train.stop_after=2", "train.max_train_steps=8")
        whole = tune(*settings)
        assert (whole.record["steps"], whole.record["exported_step"]) == (6, 2)
        resumed = tune(*settings, start=3)
        assert (resumed.record["steps"], resumed.record["exported_step"]) == (6, 2)
        assert_same(resumed.state, whole.state)

    def test_weights_that_are_no_numbers_are_not_sampled_from(self, tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "dreambooth.engine.TorchEngine.state_dict", lambda self: {"denoiser.weight": torch.tensor([1.0, torch.nan])}
        )
        with pytest.raises(Diverged, match="no numbers after step 2; lower train"):
            tune()


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("override", ["train.keep=best", "train.stop_after=2"])
def test_scores_have_to_be_measured(override: str) -> None:
    plain: dict[str, Any] = {"subject": {"name": "rex", "class_noun": "dog", "instance_images": "photos"}}
    with pytest.raises(InputError, match="goes by scores of the training; set evaluation"):
        load_config(plain, (override,))
