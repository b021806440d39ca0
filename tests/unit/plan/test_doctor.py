"""How the doctor judges what nodes say; that nodes are asked is tested on a real cluster."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from dreambooth.config.settings import DreamBoothConfig, load_config
from pipelines.cli import main
from pipelines.plan.doctor import Finding, judge_auth, judge_encryption, judge_nodes, judge_versions, probe_tracking
from pipelines.plan.node_facts import PACKAGES, NodeFacts, installed_versions

GIB = 1 << 30
NODE = NodeFacts(
    node="one",
    versions=dict.fromkeys(("python", *PACKAGES), "1.0"),
    cpus=4,
    memory_bytes=16 * GIB,
    gpus=(("L4", 24 * GIB),),
    free_disk_bytes=100 * GIB,
    compiler=None,
    built_ops=(),
    skew_seconds=0.1,
    storage_error=None,
    base_error=None,
    base_load_seconds=2.0,
)


def config(*overrides: str) -> DreamBoothConfig:
    return load_config({"subject": {"name": "rex", "class_noun": "dog", "instance_images": "x"}}, overrides)


def judged(*nodes: NodeFacts, overrides: tuple[str, ...] = ()) -> dict[str, Finding]:
    return {finding.check: finding for finding in judge_nodes(nodes, config(*overrides))}


def test_a_healthy_cluster_has_nothing_to_cure() -> None:
    findings = judged(NODE, replace(NODE, node="two"))
    assert {finding.state for finding in findings.values()} == {"ok"}
    assert not [finding for finding in findings.values() if finding.cure]
    assert findings["devices"].found.startswith("2 x L4 24 GiB; 8 CPUs")
    assert findings["base model"].found == "miniature loads in 2.0 s"


@pytest.mark.parametrize(
    ("check", "change", "state", "found"),
    [
        ("disk", {"free_disk_bytes": 3 * GIB}, "warning", "two: 3 GiB free"),
        ("clock", {"skew_seconds": -61.0}, "failure", "two: -61.0 s"),
        ("storage", {"storage_error": "no such bucket"}, "failure", "two: no such bucket"),
        ("base model", {"base_error": "not there"}, "failure", "two: not there"),
    ],
)
def test_the_node_at_fault_is_named_and_a_cure_is_given(
    check: str, change: dict[str, object], state: str, found: str
) -> None:
    finding = judged(NODE, replace(NODE, node="two", **change))[check]  # type: ignore[arg-type]
    assert (finding.state, finding.found) == (state, found)
    assert finding.cure


def test_workers_that_do_not_fit_are_told() -> None:
    finding = judged(NODE, overrides=("cluster.num_workers=2", "cluster.use_gpu=true"))["devices"]
    assert finding.state == "failure"
    assert "2 CPUs and 2 GPUs, but the cluster has 4 CPUs and 1 GPU" in finding.cure


def test_versions_that_differ_are_told_by_node() -> None:
    assert judge_versions([NODE, NODE]).state == "ok"
    other = replace(NODE, node="two", versions={**NODE.versions, "torch": "2.0"})
    finding = judge_versions([NODE, other])
    assert (finding.state, finding.found) == ("failure", "torch: 1.0 on one, 2.0 on two")
    without = replace(NODE, versions={**NODE.versions, "mlflow": "none"})
    assert judge_versions([without]).state == "failure"
    assert judge_versions([replace(NODE, versions=installed_versions())]).state == "ok"


@pytest.mark.parametrize(
    ("answer", "host", "state"),
    [
        (401, "10.0.0.1:8265", "ok"),
        (200, "10.0.0.1:8265", "failure"),
        (200, "127.0.0.1:8265", "warning"),
        (None, "none", "warning"),
    ],
)
def test_an_open_dashboard_is_a_failure_where_others_reach_it(answer: int | None, host: str, state: str) -> None:
    assert judge_auth(answer, host).state == state


@pytest.mark.parametrize(("nodes", "encrypted", "state"), [(3, True, "ok"), (1, False, "ok"), (3, False, "warning")])
def test_traffic_between_nodes_in_the_clear_is_told(nodes: int, encrypted: bool, state: str) -> None:
    assert judge_encryption(nodes, encrypted).state == state


def test_a_database_of_tracking_is_looked_at_and_left_as_it_was(
    tracking_in: Callable[[Path], str], tmp_path: Path
) -> None:
    copy = Path(tracking_in(tmp_path).removeprefix("sqlite:///"))
    before = copy.read_bytes()
    assert "can be written" in probe_tracking(config(f"tracking.uri=sqlite:///{copy}"))
    assert copy.read_bytes() == before
    assert "is made by the first run" in probe_tracking(config(f"tracking.uri=sqlite:///{tmp_path}/other.db"))
    assert not (tmp_path / "other.db").exists()


def test_a_dashboards_address_is_explained() -> None:
    done = CliRunner().invoke(main, ["doctor", "--address", "http://head:8265"])
    assert (done.exit_code, "ray job submit" in done.output) == (2, True)
