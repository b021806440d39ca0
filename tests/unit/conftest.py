"""What Kubernetes and KubeRay take, for the tests of what they are told.

Checked offline: every built-in kind, and every pod, strictly against Kubernetes' own schema (by kubernetes-validate);
KubeRay's and Kueue's kinds against the fields written down in kuberay-1.7.yaml, and those rules of KubeRay's admission
(validation.go of 1.7.0) that can concern us; that nothing runs as root, with privileges or without limits. Not checked:
that the images exist, and what a real cluster does with it all.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

KUBERAY = yaml.safe_load(Path(__file__).with_name("kuberay-1.7.yaml").read_text())


@pytest.fixture(scope="session")
def check_for_kubernetes() -> Callable[[dict[str, Any]], None]:
    """A function that raises for what would be refused in an object, or could be more restricted."""
    return check


@pytest.fixture(scope="session")
def pods_in() -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    """A function that finds the pods in an object of any kind."""
    return pods_of


def templates_of(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod templates in an object of any kind."""
    spec = manifest.get("spec", {})
    if manifest["kind"] in ("StatefulSet", "Deployment", "Job"):
        yield spec["template"]
    cluster = spec if manifest["kind"] == "RayCluster" else spec.get("rayClusterSpec", {})
    if "headGroupSpec" in cluster:
        yield cluster["headGroupSpec"]["template"]
        yield from (group["template"] for group in cluster["workerGroupSpecs"])
    if "submitterPodTemplate" in spec:
        yield spec["submitterPodTemplate"]


def pods_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [template["spec"] for template in templates_of(manifest)]


def check(manifest: dict[str, Any]) -> None:
    kind = f"{manifest['apiVersion']}/{manifest['kind']}"
    if kind in KUBERAY["kinds"]:
        schema = {"$defs": KUBERAY["$defs"], **KUBERAY["kinds"][kind]}
        Draft202012Validator(schema).validate(manifest.get("spec", {}))
        for template in templates_of(manifest):
            whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
            kubernetes("PodTemplate", "v1").validate(whole)
    else:
        kubernetes(manifest["kind"], manifest["apiVersion"]).validate(manifest)
    check_rules_of_kuberay(manifest)
    for pod in pods_of(manifest):
        check_restricted(pod)


@functools.cache
def kubernetes(kind: str, api_version: str) -> Draft202012Validator:
    """Kubernetes' own schema of a kind, strict; kubernetes_validate.validate would read all of it at every call."""
    schema = json.loads((schemas() / f"{kind.lower()}-{re.sub(r'[.][^/]*/|/', '-', api_version)}.json").read_text())
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ definitions())


@functools.cache
def definitions() -> Registry:
    contents = json.loads((schemas() / "_definitions.json").read_text())
    return (Resource.from_contents(contents) @ Registry()).crawl()


def schemas() -> Path:
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    return folder / f"v{kubernetes_validate.latest_version()}-local-strict"


def check_rules_of_kuberay(manifest: dict[str, Any]) -> None:
    spec, name = manifest.get("spec", {}), manifest["metadata"]["name"]
    if manifest["kind"] == "RayJob":
        assert len(name) <= 47
        assert spec["shutdownAfterJobFinishes"]
        spec = spec["rayClusterSpec"]
    elif manifest["kind"] != "RayCluster":
        return
    assert len(name) <= 53
    assert name[0].isalpha()
    # Token authentication needs a version, 2.52 or later.
    assert spec["authOptions"]["mode"] == "token"
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert len({group.get("groupName") for group in groups}) == len(groups)
    for group in groups:
        assert group.get("minReplicas", 0) <= group.get("maxReplicas", 0)
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"  # autoscaler v2
        variables = {each["name"] for each in group["template"]["spec"]["containers"][0].get("env", [])}
        assert not variables & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"}
    if "gcsFaultToleranceOptions" in spec:
        assert "storage" not in spec["gcsFaultToleranceOptions"]


def check_restricted(pod: dict[str, Any]) -> None:
    """Pod security 'restricted', no token of Kubernetes without need, and every container has its limits."""
    assert "automountServiceAccountToken" in pod or pod["containers"][0]["name"] == "ray-head"
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        context = pod.get("securityContext", {}) | container["securityContext"]
        assert context["runAsNonRoot"]
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
