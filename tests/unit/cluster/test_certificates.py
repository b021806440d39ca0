"""Certificates of nodes: who has one of the authority's can talk, who has another's or none can't."""

import contextlib
import socket
import ssl
import threading
from pathlib import Path

import pytest

from pipelines.cluster.certificates import main, tls_environment


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certified(tmp_path_factory.mktemp("cluster"), "10.0.0.7", "*.dreambooth.svc.cluster.local")


def certified(folder: Path, *names: str) -> Path:
    main(["authority", str(folder / "authority")])
    main(["node", str(folder / "authority"), str(folder / "tls"), *names])
    return folder / "tls"


def context(folder: Path, side: ssl.Purpose) -> ssl.SSLContext:
    """Strict, and mutual, as Ray's."""
    made = ssl.create_default_context(side, cafile=folder / "ca.crt")
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    return made


def talks(client: ssl.SSLContext, server: Path, name: str) -> bool:
    """Whether a client gets an answer of a server that it calls by this name."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with (
            contextlib.suppress(OSError),
            context(server, ssl.Purpose.CLIENT_AUTH).wrap_socket(theirs, server_side=True) as open_,
        ):
            open_.sendall(b"yes")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name) as open_:
            return open_.recv(3) == b"yes"
    except OSError:
        return False
    finally:
        ours.close()
        theirs.close()
        thread.join()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("10.0.0.7", True),
        ("x7-head-svc.dreambooth.svc.cluster.local", True),
        ("10.0.0.8", False),
        ("x7-head-svc.other.svc.cluster.local", False),
    ],
)
def test_a_node_answers_by_its_own_names_alone(node: Path, name: str, known: bool) -> None:
    assert talks(context(node, ssl.Purpose.SERVER_AUTH), node, name) is known


def test_another_authoritys_certificate_or_none_is_refused(node: Path, tmp_path: Path) -> None:
    other = certified(tmp_path)
    stranger = context(other, ssl.Purpose.SERVER_AUTH)
    stranger.load_verify_locations(node / "ca.crt")
    assert not talks(stranger, node, "localhost")
    assert not talks(ssl.create_default_context(cafile=node / "ca.crt"), node, "localhost")


def test_keys_are_their_owners_alone_and_an_authority_is_never_replaced(node: Path) -> None:
    authority = node.parent / "authority"
    for key in (authority / "ca.key", node / "tls.key"):
        assert key.stat().st_mode & 0o077 == 0
    assert not (node / "ca.key").exists()
    with pytest.raises(FileExistsError, match="worth nothing"):
        main(["authority", str(authority)])
    main(["node", str(authority), str(node)])  # a node's is, when its pod starts again


def test_ray_is_told_of_what_is_there(node: Path) -> None:
    told = tls_environment(node)
    assert told.pop("RAY_USE_TLS") == "1"
    assert all(Path(path).is_file() for path in told.values())


def test_wrong_words_get_the_usage() -> None:
    with pytest.raises(SystemExit, match="authority FOLDER"):
        main(["nod"])
