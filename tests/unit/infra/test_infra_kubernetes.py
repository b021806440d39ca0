"""infra/kubernetes, base and overlays: valid (see conftest.py for what that means), complete, and closed."""

import copy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cluster.certificates import tls_environment
from pipelines.plan.manifests import GIVE_NOTICE

ROOT = Path(__file__).parents[3]
KUBERNETES = ROOT / "infra" / "kubernetes"
OVERLAYS = ("base", "overlays/cpu-demo", "overlays/gpu")
SECRETS = {
    "dreambooth-ray-token": {"auth_token"},
    "dreambooth-redis": {"password"},
    "dreambooth-credentials": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    "dreambooth-server": {"POSTGRES_PASSWORD"},
    "dreambooth-authority": set(),
}
"""The secrets that infra/kubernetes/README.md has one make, with the keys that are named one by one."""


def rendered(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of the features that are used here: resources, images, JSON patches."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "resources", "images", "patches"}
    assert set(kustomization) <= known, "teach this function, too"
    objects: list[dict[str, Any]] = []
    for name in kustomization["resources"]:
        path = folder / name
        # A deep copy, since anchors make several places one object.
        documents = rendered(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
        objects += [yaml.load(yaml.dump(each, Dumper=NoAliases), yaml.SafeLoader) for each in documents]
    for patch in kustomization.get("patches", []):
        (target,) = [
            each
            for each in objects
            if (each["kind"], each["metadata"]["name"]) == (patch["target"]["kind"], patch["target"]["name"])
        ]
        text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text()
        for operation in yaml.safe_load(text):
            apply(operation, target)
    for each in objects:
        rename_images(each, kustomization.get("images", []))
    return objects


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def apply(operation: dict[str, Any], target: Any) -> None:
    """One operation of a JSON patch (RFC 6902)."""

    def find(path: str) -> tuple[Any, Any]:
        *above, last = [part.replace("~1", "/") for part in path.strip("/").split("/")]
        place = target
        for part in above:
            place = place[int(part)] if isinstance(place, list) else place[part]
        return place, (last if isinstance(place, dict) else len(place) if last == "-" else int(last))

    place, key = find(operation["path"])
    if operation["op"] == "copy":
        source, name = find(operation["from"])
        value = copy.deepcopy(source[name])
    else:
        value = copy.deepcopy(operation["value"])
    if operation["op"] == "replace":
        place[key]  # has to be there
        place[key] = value
    elif isinstance(place, list):
        place.insert(key, value)
    else:
        place[key] = value


def rename_images(value: Any, rules: list[dict[str, str]]) -> None:
    if isinstance(value, list):
        for each in value:
            rename_images(each, rules)
    elif isinstance(value, dict):
        if isinstance(image := value.get("image"), str):
            name, _, tag = image.partition(":")
            rule = next((rule for rule in rules if rule["name"] == name), {})
            value["image"] = f"{rule.get('newName', name)}:{rule.get('newTag', tag)}".rstrip(":")
        for each in value.values():
            rename_images(each, rules)


@pytest.fixture(params=OVERLAYS, scope="module")
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return rendered(KUBERNETES / request.param)


def test_it_is_valid(objects: list[dict[str, Any]], check_for_kubernetes: Callable[[Any], None]) -> None:
    for each in objects:
        check_for_kubernetes(each)


def test_what_is_referred_to_is_there(objects: list[dict[str, Any]]) -> None:
    there = {(each["kind"], each["metadata"]["name"]) for each in objects}
    for each in objects:
        for kind, name, key in references(each):
            if kind == "Secret":
                assert key is None or key in SECRETS[name], (name, key)
            else:
                assert (kind, name) in there
    readme = (KUBERNETES / "README.md").read_text()
    for name, keys in SECRETS.items():
        assert f"create secret generic {name} " in readme
        assert all(f"--from-literal={key}=" in readme for key in keys)


def test_rays_nodes_and_mlflow_talk_by_tls(objects: list[dict[str, Any]], pods_in: Callable[[Any], Any]) -> None:
    told = [{"name": name, "value": value} for name, value in tls_environment("/tls").items()]
    (cluster,) = [each for each in objects if each["kind"] == "RayCluster"]
    pods = pods_in(cluster)
    # KubeRay hands a container's env and mounts, but not its envFrom, to the one that waits for Ray.
    for container in [cluster["spec"]["autoscalerOptions"], *(pod["containers"][0] for pod in pods)]:
        assert container["env"] == told
        assert {"name": "tls", "mountPath": "/tls", "readOnly": True} in container["volumeMounts"]
    (mlflow,) = [each for each in objects if each["kind"] == "Deployment" and each["metadata"]["name"] == "mlflow"]
    for pod in [*pods, *pods_in(mlflow)]:
        (certificate,) = pod["initContainers"]
        module = "pipelines.cluster.certificates"
        assert certificate["command"][:6] == ["python", "-m", module, "node", "/authority", "/tls"]
        with_key = [each["name"] for each in [*pod["initContainers"], *pod["containers"]] if sees_authority(each)]
        assert with_key == ["certificate"]
    (settings,) = [each["data"] for each in objects if each["metadata"]["name"] == "dreambooth-settings"]
    assert settings["MLFLOW_TRACKING_URI"].startswith("https://")


def sees_authority(container: dict[str, Any]) -> bool:
    return any(mount["name"] == "authority" for mount in container["volumeMounts"])


def test_a_pod_that_goes_gives_notice_as_one_of_a_manifest_does(objects: list[dict[str, Any]]) -> None:
    (cluster,) = [each for each in objects if each["kind"] == "RayCluster"]
    for group in cluster["spec"]["workerGroupSpecs"]:
        hook = group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert hook == ["/bin/sh", "-c", GIVE_NOTICE]


def test_nothing_is_reachable_without_a_policy(objects: list[dict[str, Any]]) -> None:
    policies = [each["spec"] for each in objects if each["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    selected = [policy["podSelector"]["matchLabels"] for policy in policies if policy["podSelector"]]
    for each in objects:
        if each["kind"] == "Service":
            assert each["spec"]["selector"] in selected
            assert each["spec"].get("type", "ClusterIP") == "ClusterIP"
    assert not any({} in policy.get("ingress", []) for policy in policies)


def test_servers_tell_whether_they_live(objects: list[dict[str, Any]]) -> None:
    for each in objects:
        if each["kind"] in ("StatefulSet", "Deployment"):
            for container in each["spec"]["template"]["spec"]["containers"]:
                assert {"readinessProbe", "livenessProbe"} <= set(container), container["name"]


def test_no_work_on_the_head_and_workers_from_zero(objects: list[dict[str, Any]]) -> None:
    (cluster,) = [each["spec"] for each in objects if each["kind"] == "RayCluster"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert {group["minReplicas"] for group in cluster["workerGroupSpecs"]} == {0}
    assert cluster["enableInTreeAutoscaling"]


def test_no_secret_is_in_it(objects: list[dict[str, Any]], pods_in: Callable[[Any], Any]) -> None:
    assert not [each for each in objects if each["kind"] == "Secret"]
    for each in objects:
        for pod in pods_in(each):
            for container in pod["containers"]:
                for variable in container.get("env", []):
                    assert "valueFrom" in variable or "PASSWORD" not in variable["name"]


@pytest.mark.parametrize("folder", OVERLAYS)
def test_kustomize_makes_the_same_of_it(folder: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    command = ["kubectl", "kustomize", str(KUBERNETES / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)

    def by_name(objects: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
        return {(each["kind"], each["metadata"]["name"]): each for each in objects}

    assert by_name(list(yaml.safe_load_all(done.stdout))) == by_name(rendered(KUBERNETES / folder))


def references(value: Any) -> Iterator[tuple[str, str, str | None]]:
    """(kind, name, key) of every secret, configuration, claim and service account that an object names."""
    if isinstance(value, list):
        for each in value:
            yield from references(each)
    elif isinstance(value, dict):
        for field, each in value.items():
            if field in ("secretRef", "secretKeyRef"):
                yield "Secret", each["name"], each.get("key")
            elif field == "secretName":
                yield "Secret", each, None
            elif field == "configMapRef" or (field == "configMap" and "name" in each):
                yield "ConfigMap", each["name"], None
            elif field == "persistentVolumeClaim":
                yield "PersistentVolumeClaim", each["claimName"], None
            else:
                yield from references(each)
