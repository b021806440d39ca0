"""Services without starting them: the env file that is made, and that compose.yaml is complete and closed."""

import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[3] / "infra" / "services"


def make_env(folder: Path) -> dict[str, str]:
    command = [sys.executable, str(FOLDER / "services.py"), "env", "--folder", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return dict(line.split("=", 1) for line in (folder / "services.env").read_text().splitlines())


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    return loaded


def test_secrets_are_random_private_and_stay(tmp_path: Path) -> None:
    first, other = make_env(tmp_path / "a"), make_env(tmp_path / "b")
    assert make_env(tmp_path / "a") == first
    secret = [name for name in first if not name.endswith("_PORT")]
    assert len({*(first[name] for name in secret), *(other[name] for name in secret)}) == 2 * len(secret)
    assert min(len(first[name]) for name in secret) >= 20
    assert stat.S_IMODE((tmp_path / "a" / "services.env").stat().st_mode) == 0o600


def test_what_a_user_puts_into_the_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "services.env").write_text("MLFLOW_PORT=5999\nPOSTGRES_PASSWORD=mine\n")
    settings = make_env(tmp_path)
    assert (settings["MLFLOW_PORT"], settings["POSTGRES_PASSWORD"]) == ("5999", "mine")
    assert settings["MLFLOW_ADMIN_PASSWORD"]


def test_compose_asks_for_nothing_that_is_not_in_the_file(compose: dict[str, Any], tmp_path: Path) -> None:
    wanted = set(re.findall(r"\$\{([A-Z0-9_]+)", (FOLDER / "compose.yaml").read_text()))
    assert wanted <= set(make_env(tmp_path))
    assert wanted >= {"POSTGRES_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY", "S3_SECRET_KEY"}
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            assert "${" in value or not re.search(r"PASSWORD|SECRET", name), name


def test_compose_opens_loopback_only(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_waits_for_health_and_keeps_data(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        if service.get("restart") is not None:
            assert "healthcheck" in service, name
        for other, condition in service.get("depends_on", {}).items():
            healthy = condition["condition"] == "service_healthy"
            assert ("healthcheck" in services[other]) is healthy, (name, other)
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in compose["volumes"]
    dockerfile = services["mlflow"]["build"]["dockerfile"]
    assert (FOLDER / services["mlflow"]["build"]["context"] / dockerfile).is_file()


def test_compose_and_kubernetes_run_the_same_servers(compose: dict[str, Any]) -> None:
    images = {service["image"] for service in compose["services"].values()}
    manifests = FOLDER.parent / "kubernetes"
    text = "\n".join(path.read_text() for path in manifests.rglob("*.yaml"))
    assert all(image in text for image in images if not image.startswith("dreambooth"))


def test_mlflow_talks_tls_as_in_kubernetes(compose: dict[str, Any]) -> None:
    [options] = [word for word in compose["services"]["mlflow"]["command"] if word.startswith("--uvicorn-opts=")]
    assert f"- {options}" in (FOLDER.parent / "kubernetes" / "base" / "mlflow.yaml").read_text()
    files = re.findall(r"(/tls)/tls\.(?:crt|key)", options)
    assert len(files) == 2
    assert "tls:/tls:ro" in compose["services"]["mlflow"]["volumes"]
    assert "https://" in str(compose["services"]["mlflow"]["healthcheck"])
