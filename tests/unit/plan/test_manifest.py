"""`dreambooth manifest`: what it prints is valid (see conftest.py), of the plan's size, and always the same."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from dreambooth.config.settings import load_config
from pipelines.cli import main
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.manifests import Placement, worker_pods
from pipelines.plan.run_plan import make_plan

Manifests = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run_yaml(tiny_pipeline: Path, instance_folder: Path, tmp_path: Path) -> Path:
    """A run whose addresses a cluster could reach: all in a store in memory."""
    from pipelines.storage.files import write_bytes

    for path in instance_folder.iterdir():
        write_bytes(f"memory://photos/red-dog/{path.name}", path.read_bytes())
    path = tmp_path / "rex.yaml"
    subject = {"name": "rex", "class_noun": "dog", "instance_images": "memory://photos/red-dog"}
    path.write_text(yaml.safe_dump({"subject": subject, "storage": {"root": "memory://results"}}))
    return path


def run_manifest(*words: object) -> Any:
    return CliRunner().invoke(main, ["manifest", *map(str, words), "--image", "registry.example.com/dreambooth:1"])


@pytest.fixture
def manifests_of(check_for_kubernetes: Callable[[Any], None]) -> Manifests:
    def manifests(*words: object) -> list[dict[str, Any]]:
        done = run_manifest(*words)
        assert done.exit_code == 0, done.output
        printed = list(yaml.safe_load_all(done.output))
        for manifest in printed:
            check_for_kubernetes(manifest)
        return printed

    return manifests


def test_a_run_brings_its_configuration_and_a_cluster_of_its_size(run_yaml: Path, manifests_of: Manifests) -> None:
    sets = ("--set", "cluster.num_workers=12", "--set", "zero.stage=3")
    configuration, job = manifests_of("rayjob", run_yaml, *sets, "--deadline", 2, "--retries", 1)
    assert configuration["data"] == {"run.yaml": run_yaml.read_text()}
    spec = job["spec"]
    assert spec["entrypoint"] == (
        "dreambooth run /etc/dreambooth/run.yaml --set cluster.num_workers=12 --set zero.stage=3 "
        "--set cluster.address=auto"
    )
    assert (spec["activeDeadlineSeconds"], spec["backoffLimit"]) == (7200, 1)
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "dreambooth"}
    assert job["metadata"]["annotations"]["dreambooth/engine"] == "deepspeed, ZeRO-3"
    # Twelve workers on nodes of eight GPUs: two pods of six.
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "6"


def test_the_same_again_is_the_same_and_other_settings_are_another_job(run_yaml: Path, manifests_of: Manifests) -> None:
    first, second = (run_manifest("rayjob", run_yaml).output for _ in range(2))
    assert first == second
    (_, job), (_, other) = (
        manifests_of("rayjob", run_yaml),
        manifests_of("rayjob", run_yaml, "--set", "train.max_train_steps=5"),
    )
    assert job["metadata"]["name"] != other["metadata"]["name"]


def test_a_batch_has_the_pods_of_its_lanes(run_yaml: Path, tmp_path: Path, manifests_of: Manifests) -> None:
    table = tmp_path / "My Dogs, all of them; a rather long name for such a table.yaml"
    subject = "class_noun: dog, instance_images: memory://photos/red-dog"
    table.write_text(
        f"storage: {{root: memory://results}}\ncluster: {{lanes: 2, use_gpu: false}}\n"
        f"subjects:\n  - {{name: rex, {subject}}}\n  - {{name: kim, {subject}}}\n"
    )
    configuration, job = manifests_of("rayjob", table, "--queue", "")
    assert "labels" not in job["metadata"]
    assert job["metadata"]["name"].startswith("my-dogs-all-of-them-a-rather-long-nam")
    (file,) = configuration["data"]
    assert f"dreambooth batch /etc/dreambooth/{file} --set" in job["spec"]["entrypoint"]
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (group["replicas"], resources["cpu"]) == (2, "1")
    assert "nvidia.com/gpu" not in resources


def test_a_cluster_that_stays_scales_from_zero(run_yaml: Path, manifests_of: Manifests) -> None:
    (cluster,) = manifests_of("raycluster", run_yaml, "--set", "cluster.num_workers=4")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 1)
    assert cluster["spec"]["enableInTreeAutoscaling"]


def test_memory_grows_with_what_a_worker_holds(run_yaml: Path) -> None:
    def pods(*overrides: str) -> int:
        plan = make_plan(load_config(run_yaml, overrides), Resources(cpus=64, gpus=64))
        return worker_pods(plan, lanes=1, gpus_per_node=Placement(image="x").gpus_per_node).memory_bytes

    assert pods("zero.offload_optimizer=true") > pods() < pods("cluster.use_gpu=false")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("storage.root=output", "a path of this machine, which pods don't see"),
        ("tracking.uri=http://me:hunter2@mlflow:5000", r"http://me:\*\*\*@mlflow:5000 holds a password"),
    ],
)
def test_what_a_cluster_cannot_use_is_said(run_yaml: Path, change: str, message: str) -> None:
    done = run_manifest("rayjob", run_yaml, "--set", change)
    assert done.exit_code == 2
    assert re.search(message, done.output)
    assert "hunter2" not in done.output


def test_a_batch_without_lanes_is_asked_for_them(run_yaml: Path, tmp_path: Path) -> None:
    table = tmp_path / "dogs.jsonl"
    table.write_text('{"name": "rex", "class_noun": "dog", "instance_images": "memory://photos/red-dog"}')
    done = run_manifest("rayjob", table, "--set", "storage.root=memory://results")
    assert (done.exit_code, "cluster.lanes is not set" in done.output) == (2, True)


def test_a_folder_named_like_the_built_in_base_is_nothing_of_the_runs(
    run_yaml: Path, working_folder: Path, manifests_of: Manifests
) -> None:
    (working_folder / "miniature").mkdir()
    (run_yaml.parent / "utf16.yaml").write_bytes(run_yaml.read_text().encode("utf-16"))
    configuration, _ = manifests_of("rayjob", run_yaml.parent / "utf16.yaml")
    assert configuration["data"] == {"run.yaml": run_yaml.read_text()}
