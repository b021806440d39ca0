"""Which weights are exported, when a training ends early, and that a resume changes neither."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreambooth.config.settings import load_config
from dreambooth.errors import InputError
from dreambooth.training.best_checkpoint import Score, Scores
from dreambooth.training.checkpoint_files import save_files
from pipelines.worker.history import History


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
        save_files(History(step=30, metrics=[{"step": 30.0}], scores=kept).files(), tmp_path)
        again = History.load(tmp_path)
        assert again.scores.measured == kept.measured
        assert weights_of(again.scores) == 20
        assert (again.step, again.metrics) == (30, [{"step": 30.0}])

    def test_a_checkpoint_without_scores(self, tmp_path: Path) -> None:
        save_files(History(step=3).files(), tmp_path)
        assert History.load(tmp_path).scores == Scores()


@pytest.mark.parametrize("override", ["train.keep=best", "train.stop_after=2"])
def test_scores_have_to_be_measured(override: str) -> None:
    plain: dict[str, Any] = {"subject": {"name": "rex", "class_noun": "dog", "instance_images": "photos"}}
    with pytest.raises(InputError, match="goes by scores of the training; set evaluation"):
        load_config(plain, (override,))
