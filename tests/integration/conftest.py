"""One Ray for the whole session: starting it takes longer than most of what is tested on it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dreambooth.config import ClusterConfig, DreamBoothConfig, load_config


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with four CPUs, whatever the machine has, so that four actors can be compared with one."""
    import ray

    from pipelines.cluster import ray_cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.cluster.local_resources", _four_cpus)
        with ray_cluster(ClusterConfig()):
            yield
    assert not ray.is_initialized()


def _four_cpus() -> Any:
    from pipelines.cluster import Resources

    return Resources(cpus=4, gpus=0)


@pytest.fixture
def make_config(tiny_pipeline: Path, tmp_path: Path) -> Any:
    """Configurations of a subject of the miniature on a tiny random base; keywords are dotted with `__`."""

    def make(**settings: Any) -> DreamBoothConfig:
        from dreambooth.miniature import subject_dir

        plain = {
            "base_model": str(tiny_pipeline),
            "subject": {
                "name": "coral-car",
                "class_noun": "car",
                "identifier": "tfz",
                "instance_images": str(subject_dir("coral-car")),
            },
            "prior": {"num_class_images": 8, "num_inference_steps": 2, "batch_size": 4},
            "train": {"max_train_steps": 6, "learning_rate": 1e-3, "checkpoint_every": 100},
            "storage": {"root": str(tmp_path / "output")},
            "evaluation": {"images_per_prompt": 1, "num_inference_steps": 2},
        }
        overrides = tuple(f"{name.replace('__', '.')}={value}" for name, value in settings.items())
        return load_config(plain, overrides)

    return make
