"""Addresses where nothing answers are refused within seconds."""

import contextlib
import http.server
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import pytest

from dreambooth.errors import InputError
from dreambooth.reach import prove_store
from pipelines.cluster.ray_cluster import ray_cluster
from pipelines.driver.jobs import connect as connect_to_jobs
from pipelines.storage.files import check_writable, filesystem
from pipelines.tracking.client import check_connection, resolve_tracking_uri

SECONDS = 10.0


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def silent() -> Iterator[str]:
    """host:port of what takes every connection and never says a word."""
    with listening() as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closing() -> Iterator[str]:
    """host:port of what ends every connection at once."""
    with listening() as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def web() -> Iterator[str]:
    """host:port of a web server that knows nothing of Ray, MLflow or S3."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        do_HEAD = do_POST = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def grpc_server() -> Iterator[str]:
    """host:port of a gRPC server that is no cluster's."""
    import grpc

    with futures.ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


@pytest.fixture
def place(request: pytest.FixtureRequest) -> str:
    """What a test's parameter names: an address, or the fixture that serves one."""
    name = str(request.param)
    return str(request.getfixturevalue(name)) if name.isidentifier() else name


@contextlib.contextmanager
def refused_within_seconds(expected: str) -> Iterator[None]:
    began = time.monotonic()
    with pytest.raises(InputError) as refused:
        yield
    assert time.monotonic() - began < SECONDS
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tests of silence wait less than a person does, but for one."""
    if "silent" in request.node.name:
        monkeypatch.setattr("dreambooth.reach._ANSWER_SECONDS", 0.3)
        monkeypatch.setattr("pipelines.tracking.client._DATABASE_SECONDS", 0.3)
        monkeypatch.setattr("pipelines.cluster.address._SECONDS", 0.3)
        monkeypatch.setattr("pipelines.cluster.address._SECONDS_MORE", 0.3)
        monkeypatch.setattr("pipelines.driver.jobs._PATIENCE_SECONDS", (0.3, 0.3))


NOWHERE = "127.0.0.1:1"
UNKNOWN = "no-such-host.invalid:6379"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (NOWHERE, "nothing listens there"),
        (UNKNOWN, "there is no host of that name"),
        ("silent", "it doesn't answer for seconds"),
        ("closing", "ends the connection"),
        ("web", "a web server is there"),
        ("grpc_server", "speaks gRPC, but is no head of a Ray cluster"),
        ("ray://127.0.0.1:10001", "an address of Ray Client"),
        ("http://127.0.0.1:8265", "a dashboard's"),
        ("s3://bucket", "expected 'auto'"),
        (" ", "expected 'auto'"),
        ("10.0.0.1", "expected 'auto'"),
        ("10.0.0.1:0", "expected a port from 1 to 65535"),
        ("::1:6379", "an IPv6 address goes in brackets"),
        ("[::1]:1", "no Ray cluster answers at cluster.address '[::1]:1'"),
    ],
    indirect=["place"],
)
def test_a_ray_cluster_that_is_not_there(place: str, expected: str) -> None:
    from dreambooth.config.settings import ClusterConfig

    with refused_within_seconds(expected), ray_cluster(ClusterConfig(address=place)):
        pass


def test_silence_is_not_listened_to_for_as_long_as_ray_would(silent: str) -> None:
    from dreambooth.config.settings import ClusterConfig

    with refused_within_seconds("it doesn't answer for seconds"), ray_cluster(ClusterConfig(address=silent)):
        pass


@pytest.mark.parametrize(
    ("variable", "expected"), [(None, "no Ray cluster was started on this machine"), (NOWHERE, "RAY_ADDRESS")]
)
def test_auto_without_a_cluster(
    variable: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dreambooth.config.settings import ClusterConfig

    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)  # other tests' clusters
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    with refused_within_seconds(expected), ray_cluster(ClusterConfig(address="auto")):
        pass


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (NOWHERE, "nothing listens there"),
        (UNKNOWN, "there is no host of that name"),
        ("silent", "it doesn't answer for seconds"),
        ("closing", "something else than http"),
        ("web", "a web server is there, but no Ray dashboard"),
        ("grpc_server", "as Ray's dashboard"),
    ],
    indirect=["place"],
)
def test_a_dashboard_that_is_not_there(place: str, expected: str) -> None:
    with refused_within_seconds(expected):
        connect_to_jobs(f"http://{place}")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "http://", "http://host:notaport", "auto"]
)
def test_what_is_no_dashboards_address(address: str) -> None:
    with refused_within_seconds("--address is"):
        connect_to_jobs(address)


@pytest.mark.parametrize("scheme", ["http", "https", "postgresql", "mysql+pymysql"])
@pytest.mark.parametrize("place", [NOWHERE, UNKNOWN, "silent", "closing"], indirect=True)
def test_tracking_that_is_not_there(place: str, scheme: str) -> None:
    with refused_within_seconds(f"no MLflow tracking at {scheme}://me:***@{place}"):
        check_connection(resolve_tracking_uri(f"{scheme}://me:pass-word@{place}/mlflow"))


def test_tracking_that_is_another_web_server(web: str) -> None:
    with refused_within_seconds(f"no MLflow tracking at http://{web}"):
        check_connection(f"http://{web}")


def test_tracking_by_https_where_http_is_spoken(web: str) -> None:
    with refused_within_seconds("doesn't speak TLS"):
        check_connection(f"https://{web}")


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize("place", [NOWHERE, UNKNOWN, "silent", "closing"], indirect=True)
@pytest.mark.parametrize("use", ["write", "base", "images", "table"])
def test_a_store_that_is_not_there(use: str, place: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreambooth.data.images import find_instance_images
    from dreambooth.models.base_model import resolve_base_model
    from pipelines.plan.subject_list import read_batch

    uses: dict[str, Callable[[], object]] = {
        "write": lambda: check_writable("s3://bucket/x"),
        "base": lambda: resolve_base_model("s3://bucket/x"),
        "images": lambda: find_instance_images(("s3://bucket/x",)),
        "table": lambda: read_batch("s3://bucket/x.yaml", ()),
    }
    monkeypatch.setenv(variable, f"http://{place}")
    with refused_within_seconds(f"{variable} is 'http://{place}'"):
        uses[use]()


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("127.0.0.1:9000", "expected http://host:port"),
        ("ftp://127.0.0.1", "expected http://host:port"),
        ("http://127.0.0.1:notaport", "expected a port"),
        ("https://me:pass-word", "expected a port"),
    ],
)
def test_an_endpoint_that_is_no_address(endpoint: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with refused_within_seconds(expected):
        check_writable("s3://bucket/x")


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "sftp"])
@pytest.mark.parametrize("place", [NOWHERE, UNKNOWN, "silent", "closing"], indirect=True)
def test_servers_that_are_read_from(place: str, scheme: str) -> None:
    with refused_within_seconds("can't read it: nothing answers at"):
        prove_store(f"{scheme}://{place}/x", what="can't read it")


@pytest.mark.parametrize("address", ["s3://buck et/x", "http://host:99999/x", "s3://\x1bbucket/x", "out\nput"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(InputError, match=r"^the address "):
        filesystem(address)


def test_a_server_that_answers_passes(web: str, tmp_path: Path) -> None:
    prove_store(f"http://{web}/x", what="x")
    prove_store(str(tmp_path), what="x")
    prove_store("memory://x", what="x")
    prove_store("s3://bucket/x", what="x")  # a cloud's own


def test_a_server_behind_a_proxy_is_asked_for_there(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://{web}")
    prove_store(f"http://{UNKNOWN}/x", what="x")
    monkeypatch.setenv("http_proxy", f"http://{NOWHERE}")
    with pytest.raises(InputError, match=r"through the proxy 127\.0\.0\.1:1: nothing answers"):
        prove_store("http://elsewhere.invalid/x", what="x")


def test_a_certificate_of_ones_own_is_no_fault_here(tmp_path: Path) -> None:
    from pipelines.cluster.certificates import main as certify

    certify(["authority", str(tmp_path / "authority")])
    certify(["node", str(tmp_path / "authority"), str(tmp_path / "tls"), "127.0.0.1"])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "tls" / "tls.crt", tmp_path / "tls" / "tls.key")
    with listening() as server:

        def serve() -> None:
            with server.accept()[0] as plain, context.wrap_socket(plain, server_side=True) as stream:
                stream.recv(1000)
                stream.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        prove_store(f"https://127.0.0.1:{server.getsockname()[1]}/x", what="x")
        thread.join()


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (NOWHERE, "nothing listens there"),
        (UNKNOWN, "there is no host of that name"),
        ("silent", "it doesn't answer for seconds"),
        ("not-a-url", "HF_ENDPOINT is"),
    ],
    indirect=["place"],
)
def test_a_hub_that_is_not_there(place: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from dreambooth.models.base_model import resolve_base_model

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", place if place == "not-a-url" else f"http://{place}")
    with refused_within_seconds(expected):
        resolve_base_model("owner/name")
