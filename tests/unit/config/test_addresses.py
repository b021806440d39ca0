"""Addresses: taken apart, refused, shown without what is secret, and proved within seconds where nothing answers."""

import contextlib
import http.server
import os
import random
import socket
import ssl
import string
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from click.testing import CliRunner

from dreambooth.config.addresses import Address, check_address, shown, without_credentials
from dreambooth.config.settings import load_config
from dreambooth.errors import InputError
from dreambooth.reach import prove_store
from pipelines.cli import main
from pipelines.cluster.ray_cluster import ray_cluster
from pipelines.driver.jobs import connect as connect_to_jobs
from pipelines.driver.jobs import make_job
from pipelines.plan.describe import printable_settings
from pipelines.storage.files import check_writable, filesystem
from pipelines.tracking.client import check_connection, resolve_tracking_uri

SECONDS = 10.0
SCHEMES = ("http", "https", "postgresql", "mysql+pymysql", "mssql", "ftp", "sftp", "nosuch")


class TestParts:
    @pytest.mark.parametrize(
        ("text", "scheme", "host", "port", "user", "password"),
        [
            ("http://mlflow:5000/x", "http", "mlflow", 5000, None, None),
            ("127.0.0.1:6379", "", "127.0.0.1", 6379, None, None),
            ("[::1]:6379", "", "::1", 6379, None, None),
            ("HTTPS://me:a%2Fb%40c@[fe80::1]:1/x?y=z", "https", "fe80::1", 1, "me", "a/b@c"),
            ("postgresql+psycopg://me:pw@db/mlflow", "postgresql+psycopg", "db", None, "me", "pw"),
            ("s3://bucket/a@b:c", "s3", "bucket", None, None, None),
            ("simplecache::s3://bucket/x", "s3", "bucket", None, None, None),
            ("sftp://me@host/x", "sftp", "host", None, "me", None),
            ("memory://x", "memory", "x", None, None, None),
        ],
    )
    def test_of_a_sound_one(
        self, text: str, scheme: str, host: str, port: int | None, user: str | None, password: str | None
    ) -> None:
        parts = Address.parse(text, what="x")
        assert (parts.scheme, parts.host, parts.port, parts.user, parts.password) == (
            scheme, host, port, user, password
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("http://host:notaport", "expected a port from 1 to 65535"),
            ("http://host:0", "expected a port from 1 to 65535"),
            ("http://host:65536", "expected a port from 1 to 65535"),
            ("http://host:" + "9" * 5000, "expected a port from 1 to 65535"),
            ("http://host:²", "expected a port from 1 to 65535"),
            ("http://host:", "expected a port from 1 to 65535"),
            ("http://:5000", "expected the name of a host"),
            ("http://ho st:5000", "expected the name of a host, without blanks"),
            ("http://ho\nst", "control character U+000A"),
            ("http://ho\u200bst", "expected the name of a host, without blanks"),
            ("http://[::1:5000", "brackets"),
            ("http://[nonsense]:5000", "expected an IPv6 address in the brackets"),
            ("::1:5000", "an IPv6 address goes in brackets"),
            ("http://me:pa/ss@host", "write it as %2F, %3F, %23 or %40"),
            ("http://me:12/34@host", "write it as %2F, %3F, %23 or %40"),
            ("http://me:pa#ss@host", "write it as %2F, %3F, %23 or %40"),
            ("http://me:pa?ss@host", "write it as %2F, %3F, %23 or %40"),
            ("http://me:pa@ss@host", "write it as %2F, %3F, %23 or %40"),
            ("1http://host", "expected an address such as scheme://host"),
            ("s3://", "expected the name of a bucket behind s3://"),
            ("gs:///results", "expected the name of a bucket behind gs://"),
            ("simplecache::s3:///x", "expected the name of a bucket behind s3://"),
            ("https:///x", "expected the name of a host behind https://"),
            ("sftp://me@/x", "expected the name of a host behind sftp://"),
        ],
    )
    def test_of_none(self, text: str, expected: str) -> None:
        with pytest.raises(InputError, match=r"^the tracker ") as refused:
            Address.parse(text, what="the tracker")
        assert expected in str(refused.value)

    @pytest.mark.parametrize(
        ("address", "meant"), [("s3:/bucket/x", "s3://bucket/x"), ("S3:bucket", "S3://bucket"), ("http:/h", "http://h")]
    )
    def test_with_a_slash_too_few(self, address: str, meant: str) -> None:
        with pytest.raises(InputError) as refused:
            check_address(address, what="storage.root")
        assert str(refused.value) == (
            f"storage.root is {address!r}, a path of this machine; write {meant}, or ./{address}"
        )

    @pytest.mark.parametrize(
        "path",
        ["output", "./a b/c", "/x/y:z@1", "Ali\u200dAhmad", "models:/a@latest", "sqlite:////x/y.db", "file:///x"],
    )
    def test_a_path_of_this_machine_passes(self, path: str) -> None:
        assert check_address(path, what="x") == path


class TestWhatIsShown:
    @pytest.mark.parametrize(
        ("address", "expected"),
        [
            ("http://me:secret@mlflow:5000/x", "http://me:***@mlflow:5000/x"),
            ("https://ghp_token@host/x", "https://***@host/x"),
            ("postgresql://me:s/e#c?r@e%t@db:5432/mlflow", "postgresql://me:***@db:5432/mlflow"),
            ("postgresql://db/mlflow?user=me&password=secret&sslmode=require", "postgresql://db/mlflow?user=***&password=***&sslmode=require"),
            ("https://b.s3.amazonaws.com/x.png?X-Amz-Credential=AKIA&X-Amz-Signature=abc", "https://b.s3.amazonaws.com/x.png?X-Amz-Credential=***&X-Amz-Signature=***"),
            ("http://host/x?user=a@b&password=c", "http://***@b&password=***"),
            ("http://host/x#access_token=abc", "http://host/x#access_token=***"),
            ("http://me:secret", "http://me:***"),
            ("http://me:secret@[::1]:5000", "http://me:***@[::1]:5000"),
            ("s3://AKIA:secret@bucket/x", "s3://AKIA:***@bucket/x"),
            ("zip://x.png::https://me:secret@host/y.zip", "zip://x.png:***@host/y.zip"),
        ],
    )  # fmt: skip
    def test_of_one_with_credentials(self, address: str, expected: str) -> None:
        assert shown(address) == expected
        assert "secret" not in without_credentials(f"can't open '{address}', really; ({address})")

    @pytest.mark.parametrize(
        "address",
        [
            "http://[::1]:5000/x", "s3://bucket/a@b", "s3://bucket/photos/?.png", "models:/dog@latest", "/a:b@c",
            "sqlite:////tmp/a:b@c/mlflow.db", "abfs://container@account.dfs.core.windows.net/x", "127.0.0.1:6379",
            "output/My Dog", "memory://x/y", "sftp://me@host/x", "postgresql://me@db/mlflow",
        ],
    )  # fmt: skip
    def test_of_one_without(self, address: str) -> None:
        assert shown(address) == address
        assert without_credentials(f"nothing at {address}; really") == f"nothing at {address}; really"

    def test_of_one_without_a_scheme(self) -> None:
        assert shown("me:secret@host:6379") == "me:***@host:6379"

    def test_secrets_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter22")
        monkeypatch.setenv("HTTPS_PROXY", "http://me:trustno1@proxy:3128")
        assert without_credentials("hunter22 and trustno1 are refused") == "*** and *** are refused"


def passwords(count: int) -> list[str]:
    """Random ones of what a keyboard has, each with the letters that mean something in an address."""
    rng = random.Random(0)
    letters = string.ascii_letters + string.digits + "!$&()*+,-.;=<>[]^_`{|}~"
    return [
        "".join(
            rng.sample(rng.choices(letters, k=rng.randint(8, 20)) + rng.choices("/#@?%:", k=rng.randint(1, 4)), k=9)
        )
        for _ in range(count)
    ]


class TestPasswordsAreNeverShown:
    """Whatever is done with an address, and whatever goes wrong with it."""

    @pytest.fixture(params=passwords(2))
    def password(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def hidden(self, password: str, text: str) -> None:
        assert password not in text
        assert quote(password, safe="") not in text
        for part in (part for letter in "/#@?" for part in password.split(letter)):
            assert len(part) < 5 or part not in text

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_by_the_function_that_shows_an_address(self, scheme: str) -> None:
        for password in passwords(100):
            for address in (f"{scheme}://me:{password}@127.0.0.1:9/x", f"{scheme}://me:{quote(password, safe='')}@h"):
                self.hidden(password, shown(address))
                self.hidden(password, without_credentials(f"it said: {address} is wrong"))
                self.hidden(password, without_credentials(repr(ValueError(address))))

    @pytest.mark.parametrize("encoded", [False, True])
    @pytest.mark.parametrize("place", ["tracking.uri", "storage.root", "storage.run", "base_model", "cluster.address"])
    def test_by_a_run(
        self, password: str, place: str, encoded: bool, instance_folder: Path, working_folder: Path
    ) -> None:
        address = f"http://me:{quote(password, safe='') if encoded else password}@127.0.0.1:9/x"
        (working_folder / "run.yaml").write_text(yaml.safe_dump(nested(place, address)))
        arguments = ["run", "run.yaml", "--images", str(instance_folder), "--class-noun", "dog"]
        result = CliRunner().invoke(main, [*arguments, "--dry-run"])
        assert result.exit_code == 2, result.output
        self.hidden(password, result.output)
        assert [path.name for path in working_folder.rglob("*") if path.is_file()] == ["run.yaml"]

    @pytest.mark.parametrize(
        "command", ["generate", "models", "serve", "evaluate", "gc", "batch", "jobs", "submit", "doctor"]
    )
    def test_by_other_commands(self, password: str, command: str) -> None:
        address = f"http://me:{password}@127.0.0.1:9/x"
        arguments = {
            "generate": ["generate", "a [V] dog", "--model", "models:/x@latest", "--tracking-uri", address],
            "models": ["models", "--tracking-uri", address],
            "serve": ["serve", "--model", "models:/x@latest", "--tracking-uri", address],
            "evaluate": ["evaluate", "--model", address, "--instance-images", "x"],
            "gc": ["gc", address],
            "batch": ["batch", f"{address}.yaml"],
            "jobs": ["jobs", "list", "--address", address],
            "submit": ["submit", "run", "--set", f"tracking.uri={address}"],
            "doctor": ["doctor", "--address", address],
        }[command]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2, (result.output, result.exception)
        self.hidden(password, result.output)

    def test_by_the_settings_that_are_printed_and_tracked(self, password: str) -> None:
        settings = nested("tracking.uri", f"postgresql://me:{quote(password, safe='')}@db/mlflow")
        settings["subject"] = {
            "name": "rex",
            "class_noun": "dog",
            "instance_images": f"https://host/x.png?X-Amz-Signature={quote(password, safe='')}",
        }
        self.hidden(password, yaml.safe_dump(printable_settings(load_config(settings))))

    def test_by_a_name_that_is_taken_from_an_address(self, password: str) -> None:
        from pipelines.cli.batch import batch_name
        from pipelines.plan.subject_list import name_after

        quoted = quote(password, safe="")
        assert name_after(f"https://me:{quoted}@host/photos/Red-Dog?X-Amz-Signature={quoted}") == "red-dog"
        assert batch_name(f"https://me:{quoted}@host/My Dogs.csv?sig={quoted}") == "my-dogs"

    def test_by_what_refuses_a_job(self, password: str) -> None:
        with pytest.raises(InputError, match="holds a password") as refused:
            make_job("run", ["--set", f"tracking.uri=http://me:{password}@mlflow:5000"])
        self.hidden(password, str(refused.value))


def nested(place: str, value: str) -> dict[str, object]:
    group, _, name = place.partition(".")
    return {group: {name: value}} if name else {group: value}


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
def _straight(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, no credentials but a test's, no cluster's variables."""
    for name in [
        name for name in os.environ if name.lower().endswith("_proxy") or name.startswith(("AWS_", "RAY_ADDR"))
    ]:
        monkeypatch.delenv(name)


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
        ("silent", "it says nothing for seconds"),
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

    with refused_within_seconds("it says nothing for seconds"), ray_cluster(ClusterConfig(address=silent)):
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
        ("silent", "it says nothing for seconds"),
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
        ("silent", "it says nothing for seconds"),
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
