"""The files for Ray's cluster launcher, by its own validator with its own defaults filled in; nothing is started."""

import copy
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cluster.certificates import tls_environment

FOLDER = Path(__file__).parents[3] / "infra" / "ray"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """As the launcher itself takes it: with defaults, and every machine a worker of its own."""
    from ray.autoscaler._private.util import prepare_config

    monkeypatch.setenv("HOME", str(tmp_path))
    prepared: dict[str, Any] = prepare_config(yaml.safe_load(request.param.read_text()))
    return prepared


def test_there_is_one_for_a_cloud_and_one_for_machines() -> None:
    assert [path.stem for path in FILES] == ["aws", "machines"]


def test_the_launcher_takes_it(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(cluster)
    broken = copy.deepcopy(cluster) | {"max_worker": 1}
    with pytest.raises(Exception, match="max_worker"):
        validate_config(broken)


def test_every_start_asks_for_the_token_and_keeps_the_dashboard_at_home(cluster: dict[str, Any]) -> None:
    starts = [
        shlex.split(command)
        for kind in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in cluster[kind]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in words for words in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "/home/ray/.ray/auth_token" in cluster["file_mounts"]


def test_nodes_make_their_certificates_before_they_start_and_talk_by_tls(cluster: dict[str, Any]) -> None:
    options = cluster["docker"]["run_options"]
    assert {f"--env {name}={value}" for name, value in tls_environment("/home/ray/tls").items()} <= set(options)
    assert "/home/ray/authority" in cluster["file_mounts"]
    for kind in ("head_start_ray_commands", "worker_start_ray_commands"):
        commands = cluster[kind]
        [made] = [place for place, text in enumerate(commands) if "certificates node ~/authority ~/tls" in text]
        [started] = [place for place, text in enumerate(commands) if "ray start" in text]
        assert made < started


def test_no_work_on_the_head() -> None:
    aws = yaml.safe_load((FOLDER / "aws.yaml").read_text())
    assert aws["available_node_types"]["head"]["resources"]["CPU"] == 0
    machines = yaml.safe_load((FOLDER / "machines.yaml").read_text())
    assert any("--num-cpus=0" in command for command in machines["head_start_ray_commands"])


def test_gpu_workers_are_spot_instances_and_come_from_zero() -> None:
    types = yaml.safe_load((FOLDER / "aws.yaml").read_text())["available_node_types"]
    workers = [kind for name, kind in types.items() if name != "head"]
    assert all(kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for kind in workers)
    assert all(kind["min_workers"] == 0 and kind["resources"]["GPU"] > 0 for kind in workers)
    assert "InstanceMarketOptions" not in types["head"]["node_config"]


def test_a_spot_instance_that_is_called_back_is_drained(tmp_path: Path) -> None:
    """The command itself, with an instance's metadata that gives notice when it is asked for the third time."""
    commands = yaml.safe_load((FOLDER / "aws.yaml").read_text())["worker_start_ray_commands"]
    [watch] = [command for command in commands if "spot" in command]
    programs = {
        "curl": f"""echo "$@" >> {tmp_path}/asked
case "$*" in *api/token) echo secret; exit 0;; esac
[ "$(grep -c instance-action {tmp_path}/asked)" -ge 3 ] || exit 22""",
        "sleep": "exit 0",
        "ray": f'echo "$@" >> {tmp_path}/drained',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    here = watch.replace("/tmp/spot-notice.log", f"{tmp_path}/log")
    subprocess.run(["bash", "-c", f"{here} wait"], env=environment, check=True, timeout=20)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len([line for line in asked if "X-aws-ec2-metadata-token: secret" in line]) == 3
    [drained] = (tmp_path / "drained").read_text().splitlines()
    assert drained.startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION")
