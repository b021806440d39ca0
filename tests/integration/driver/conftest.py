"""Batches of several subjects of the miniature."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batches import FOUR_CPUS, poison

from dreambooth.miniature import subject_dir
from pipelines.plan.batch_plan import BatchPlan, make_batch_plan
from pipelines.plan.run_plan import make_plan


@pytest.fixture
def make_batch(make_config: Any, class_images: Path, tracking_in: Callable[[Path], str]) -> Callable[..., BatchPlan]:
    """A plan of several subjects of the miniature, on a tiny base, in a folder."""

    def make(folder: Path, *subjects: str, poisoned: str | None = None, **settings: Any) -> BatchPlan:
        configs = [
            make_config(
                **{
                    "subject__name": name,
                    "subject__class_noun": name.rsplit("-", 1)[-1],
                    # By name, so that a subject has the same one in whatever batch it is.
                    "subject__identifier": f"{name[0]}fz",
                    "subject__instance_images": subject_dir(name),
                    "storage__root": folder,
                    "storage__prior": class_images,
                    "tracking__uri": tracking_in(folder),
                    "evaluation__enabled": "false",
                }
                | settings
            )
            for name in subjects
        ]
        configs = [poison(config) if config.subject.name == poisoned else config for config in configs]
        return make_batch_plan("batch", [make_plan(config, FOUR_CPUS) for config in configs], FOUR_CPUS)

    return make
