"""A subject of each family, trained by real code without Ray: resumed, its best weights published, as a delta too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from replicas import built

from dreambooth.config.settings import load_config
from dreambooth.models.delta import write_delta
from dreambooth.sampling.sampler import load_pipeline
from dreambooth.training.checkpoint_files import save_files
from dreambooth.training.model import load_model
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.train_stage import train_task
from pipelines.plan.run_plan import make_plan
from pipelines.storage.publications import opened
from pipelines.tracking.client import quietly
from pipelines.worker.behind import Behind
from pipelines.worker.fine_tune import FineTuned, fine_tune
from pipelines.worker.history import History
from pipelines.worker.publish import TrainedStage, publish_result

STEPS, STOP = 3, 1


class Folders:
    """Checkpoints in folders, one a step."""

    def __init__(self, root: Path, start: int = 0) -> None:
        self._root, self._start = root, start

    def restore(self, engine: Any) -> History:
        if not self._start:
            return History()
        engine.load(self._root / str(self._start))
        return History.load(self._root / str(self._start))

    def begin(self, engine: Any, history: History) -> Behind:
        folder = self._root / str(history.step)
        folder.mkdir(exist_ok=True)
        engine.save(folder)
        save_files(history.files(), folder)
        return Behind(lambda: None)


@pytest.mark.parametrize(
    "replica", ["stable-diffusion-xl", "stable-diffusion-3.5", "flux-dev", "pixart-sigma", "deepfloyd-if"]
)
def test_the_best_weights_are_published_whole_or_as_an_exact_change_and_a_resume_changes_nothing(
    replica: str, instance_folder: Path, tmp_path: Path
) -> None:
    built(replica, tmp_path / "base")
    subject = {"name": "rex", "class_noun": "dog", "identifier": "sks", "instance_images": str(instance_folder)}
    evaluation = {"every": 1, "bank": "miniature", "prompts": ["a photo of [V] {class_noun}"], "score_images": 1}
    settings = {
        "base_model": str(tmp_path / "base"),
        "subject": subject,
        "images": {"resolution": 64},
        "prior": {"prior_loss_weight": 0},
        "train": {"max_train_steps": STEPS, "keep": "best", "checkpoint_every": 1, "gradient_checkpointing": True},
        "evaluation": evaluation | {"num_inference_steps": 2},
        "storage": {"root": str(tmp_path / "output")},
    }
    plan = make_plan(load_config(settings), Resources(cpus=1, gpus=0))
    task = train_task(plan, None)

    def tune(start: int = 0) -> FineTuned:
        model = load_model(plan.base.directory, plan.config)
        return fine_tune(task, plan.base, model, "cpu", Folders(tmp_path, start), lambda message: None)

    whole, resumed = tune(), tune(start=STOP)
    scores = {int(score["step"]): score["score"] for score in whole.record["scores"]}
    assert list(scores) == [1, 2, 3]
    assert whole.record["exported_step"] == max(scores, key=lambda step: scores[step])
    assert resumed.record["resumed_from"] == STOP
    assert resumed.record["scores"] == whole.record["scores"]
    assert [name for name in whole.state if not torch.equal(whole.state[name], resumed.state[name])] == []

    manifest = publish_result([TrainedStage(task=task, base=plan.base, tuned=whole)])
    assert manifest.metadata["step"] == whole.record["exported_step"]
    with quietly():
        from pipelines.tracking.served_model import model_directory
    with opened(manifest) as model:
        write_delta(plan.base, model, tmp_path / "delta")
        paths = [path for path in model.rglob("*") if path.is_file() and path.name != "manifest.json"]
        files = {path.relative_to(model): path.read_bytes() for path in paths}
    with model_directory(tmp_path / "delta", {}) as again:
        found = {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()}
        assert found == files
        assert load_pipeline(again).components
    kept = sum(path.stat().st_size for path in (tmp_path / "delta").rglob("*.safetensors"))
    assert kept < sum(len(content) for name, content in files.items() if name.suffix == ".safetensors") / 2
