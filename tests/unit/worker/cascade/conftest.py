"""A cascade of two small stages, and one that nothing happened to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cascade_stages import FIRST, SECOND, trained
from PIL import Image
from replicas import cascade

from dreambooth.config.settings import load_config
from pipelines.cluster.preemption import WATCHER_SWITCH
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.run_plan import Plan, make_plan
from pipelines.worker.publish import TrainedStage


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cascade.build(tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for place in range(2):
        Image.radial_gradient("L").rotate(90 * place).convert("RGB").save(folder / f"{place}.png")
    return folder


@pytest.fixture(scope="session")
def make(bases: tuple[Path, Path], photographs: Path) -> Callable[..., Plan]:
    def planned(folder: Path, *overrides: str) -> Plan:
        subject = {"name": "rex", "class_noun": "dog", "identifier": "sks", "instance_images": str(photographs)}
        plain: dict[str, Any] = {
            "base_model": str(bases[0]),
            "super_resolution": {"base_model": str(bases[1]), "max_train_steps": SECOND, "learning_rate": 1e-3},
            "subject": subject,
            "prior": {"prior_loss_weight": 0},
            "train": {"max_train_steps": FIRST, "learning_rate": 1e-3, "checkpoint_every": 2, "ema_decay": 0.5},
            "evaluation": {"enabled": False},
            "storage": {"root": str(folder)},
        }
        return make_plan(load_config(plain, overrides), Resources(cpus=2, gpus=0))

    return planned


@pytest.fixture(autouse=True)
def _no_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WATCHER_SWITCH, "0")


@pytest.fixture(scope="session")
def calm(make: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[TrainedStage]]:
    """A cascade that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WATCHER_SWITCH, "0")
        plan = make(tmp_path_factory.mktemp("calm"))
        return plan, trained(plan)
