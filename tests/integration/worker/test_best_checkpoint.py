"""The best weights of real trainings and real scores, of a tiny base model: looking and resuming change nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreambooth.config.settings import load_config
from dreambooth.errors import Diverged
from dreambooth.models.base_model import resolve_base_model
from dreambooth.training.best_checkpoint import Score
from dreambooth.training.checkpoint_files import save_files
from dreambooth.training.engine import TorchEngine
from dreambooth.training.model import load_model
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.train_stage import train_task
from pipelines.plan.run_plan import make_plan
from pipelines.worker.behind import Behind
from pipelines.worker.fine_tune import FineTuned, fine_tune
from pipelines.worker.history import History


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

    def begin(self, engine: Any, history: History) -> Behind:
        folder = self._root / str(history.step)
        folder.mkdir()
        engine.save(folder)
        save_files(history.files(), folder)
        return Behind(lambda: None)


@pytest.fixture
def tune(tiny_pipeline: Path, instance_folder: Path, tmp_path: Path) -> Any:
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


def test_looking_changes_nothing(tune: Any) -> None:
    looked, blind = tune("train.checkpoint_every=100"), tune("train.checkpoint_every=100", "evaluation.every=null")
    assert [score["step"] for score in looked.record["scores"]] == [2, 4, 6]
    assert blind.record["scores"] == []
    assert_same(looked.state, blind.state)


def test_best_is_exported_and_a_resume_is_exact(tune: Any) -> None:
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


def test_it_ends_early_and_does_so_again_after_a_resume(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    falling = {2: 0.5, 4: 0.4, 6: 0.3, 8: 0.9}
    monkeypatch.setattr(
        "pipelines.worker.fidelity.FidelityScorer.score",
        lambda self, step, state: Score(step=step, dino=falling[step], clip_t=0),
    )
    settings = ("train.keep=best", "train.stop_after=2", "train.max_train_steps=8")
    whole = tune(*settings)
    assert (whole.record["steps"], whole.record["exported_step"]) == (6, 2)
    resumed = tune(*settings, start=3)
    assert (resumed.record["steps"], resumed.record["exported_step"]) == (6, 2)
    assert_same(resumed.state, whole.state)


def test_weights_that_are_no_numbers_are_not_sampled_from(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TorchEngine.step

    def step(engine: TorchEngine) -> None:
        plain(engine)
        if engine.lr_scheduler.last_epoch == 2:
            engine.parameters[0].data.fill_(float("nan"))

    monkeypatch.setattr(TorchEngine, "step", step)
    with pytest.raises(Diverged, match="not finite after step 2; lower train"):
        tune()


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
