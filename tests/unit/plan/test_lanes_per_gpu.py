"""Lanes that share a GPU: as many as asked for and fit, or as many as were measured to gain."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dreambooth.config.settings import load_config
from dreambooth.errors import InputError
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.batch_plan import BatchPlan, describe_batch, make_batch_plan
from pipelines.plan.estimate import describe_estimate
from pipelines.plan.lanes_per_gpu import gpu_kind, lane_bytes
from pipelines.plan.manifests import worker_pods
from pipelines.plan.pace import pace_key, remember_paces
from pipelines.plan.run_plan import Plan, make_plan

TWO_GPUS = Resources(cpus=16, gpus=2, gpu_types=("H200",), gpu_bytes=141 << 30)
Plans = Callable[..., list[Plan]]


@pytest.fixture
def plans(tiny_pipeline: Path, instance_folder: Path, tmp_path: Path) -> Plans:
    """Plans of six subjects on two GPUs."""

    def make(*overrides: str, resources: Resources = TWO_GPUS) -> list[Plan]:
        settings = {
            "base_model": str(tiny_pipeline),
            "subject": {"class_noun": "dog", "identifier": "tfz", "instance_images": str(instance_folder)},
            "storage": {"root": str(tmp_path)},
            "evaluation": {"enabled": False},
        }
        names = [(*overrides, f"subject.name=rex-{number}") for number in range(6)]
        return [make_plan(load_config(settings, each), resources) for each in names]

    return make


def lanes(plan: BatchPlan) -> tuple[int, int]:
    return plan.lanes, plan.lanes_per_gpu


def test_as_many_as_asked_for_share_a_gpu(plans: Plans) -> None:
    asked = plans("cluster.lanes_per_gpu=2")
    batch = make_batch_plan("pets", asked, TWO_GPUS)
    assert lanes(batch) == (4, 2)
    rows = dict(describe_batch(batch))
    assert rows["lanes"] == "4 (2 GPUs, and a subject takes 1/2, 2 on each GPU)"
    assert rows["workers"].startswith("1 x 1/2 GPU a subject")
    assert rows["each GPU"].startswith("2 lanes, about ")
    assert rows["each GPU"].endswith("it has 141.00 GiB")
    # No more than there are subjects or CPUs for, and a GPU is not divided further than it takes.
    assert lanes(make_batch_plan("pets", asked[:2], TWO_GPUS)) == (2, 1)
    assert lanes(make_batch_plan("pets", asked, replace(TWO_GPUS, cpus=3))) == (3, 2)
    eight = plans("cluster.lanes_per_gpu=8")
    assert lanes(make_batch_plan("pets", eight, TWO_GPUS)) == (6, 3)
    pods = worker_pods(asked[0], lanes=4, gpus_per_node=8)
    assert (pods.count, pods.workers_per_pod, pods.gpus) == (2, 2, 1)


def test_what_can_not_share_is_refused(plans: Plans) -> None:
    asked = plans("cluster.lanes_per_gpu=3")
    small = replace(TWO_GPUS, gpu_bytes=int(2.5 * lane_bytes(asked)))
    with pytest.raises(InputError, match=r"is 3, which takes 3 times .* MiB, but .*; set it to 2 or less"):
        make_batch_plan("pets", asked, small)
    assert lanes(make_batch_plan("pets", asked, replace(small, gpu_bytes=int(3.5 * lane_bytes(asked))))) == (6, 3)
    rows = dict(describe_batch(make_batch_plan("pets", asked, replace(small, gpu_bytes=None))))
    assert rows["each GPU"].endswith("its memory isn't known")
    # A captured step keeps its memory while samples are made.
    assert lane_bytes(plans("train.graph=auto")) > lane_bytes(asked)
    with pytest.raises(InputError, match="several workers of one subject can't share a GPU"):
        make_batch_plan("pets", plans("cluster.lanes_per_gpu=2", "cluster.num_workers=2"), TWO_GPUS)
    with pytest.raises(InputError, match="lanes_per_gpu is 2, but the workers have no GPU"):
        make_batch_plan("pets", plans("cluster.lanes_per_gpu=2", "cluster.use_gpu=false"), TWO_GPUS)


@pytest.mark.parametrize(
    ("types", "kind"),
    [
        (("A100",), "A100"),
        (("NVIDIA A100-SXM4-80GB",), "A100"),
        (("NVIDIA H200",), "H200"),
        (("Tesla T4",), "T4"),
        (("NVIDIA GeForce RTX 4090",), "NVIDIA GeForce RTX 4090"),
        (("A100", "H100"), ""),
        ((), ""),
    ],
)
def test_ray_and_the_driver_call_a_gpu_by_other_names(types: tuple[str, ...], kind: str) -> None:
    assert gpu_kind(replace(TWO_GPUS, gpu_types=types)) == kind


def test_by_itself_a_gpu_is_shared_only_where_that_was_measured_to_gain(plans: Plans, tmp_path: Path) -> None:
    subjects, root = plans(), str(tmp_path)

    def measure(number: int, pace: float, gpu: str = "H200") -> tuple[int, int]:
        remember_paces(root, f"{number} lanes", [(subjects[0], pace)], gpu=gpu, lanes_per_gpu=number)
        return lanes(make_batch_plan("pets", subjects, TWO_GPUS))

    assert lanes(make_batch_plan("pets", subjects, TWO_GPUS)) == (2, 1)
    assert measure(2, 5.0) == (2, 1)  # over what?
    assert measure(1, 6.6, gpu="A100") == (2, 1)  # of another kind
    assert measure(1, 9.7) == (2, 1)  # 10.0 of two over 9.7 of one is no gain
    assert measure(1, 6.6) == (4, 2)
    assert measure(3, 3.2) == (4, 2)
    assert measure(3, 4.4) == (6, 3)
    time = dict(describe_estimate(subjects, 6, lanes_per_gpu=3))["time"]
    assert "4.4 steps/s of 3 lanes" in time
    tight = replace(TWO_GPUS, gpu_bytes=int(2.5 * lane_bytes(subjects)))
    assert lanes(make_batch_plan("pets", subjects, tight)) == (4, 2)
    assert lanes(make_batch_plan("pets", plans("cluster.lanes_per_gpu=1"), TWO_GPUS)) == (2, 1)
    assert pace_key(subjects[0]) == pace_key(subjects[0], lanes_per_gpu=1) != pace_key(subjects[0], lanes_per_gpu=2)
