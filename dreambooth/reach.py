"""Check within seconds that something answers at an address, before clients that wait without end are started.

A server must send a byte: a port that accepts the connection and stays silent counts as no server.
"""

import concurrent.futures
import contextlib
import os
import socket
import ssl
import threading
import urllib.request
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

from dreambooth.config.addresses import Address, shown
from dreambooth.errors import InputError

_T = TypeVar("_T")
_CONNECT_SECONDS = 4.0
_ANSWER_SECONDS = 6.0
_PORTS = {"http": 80, "https": 443, "ftp": 21, "sftp": 22, "ssh": 22, "smb": 445, "webhdfs": 9870, "hdfs": 8020}
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL"),
    "gs": ("STORAGE_EMULATOR_HOST",),
}
_SAME = {"s3a": "s3", "gcs": "gs"}
_GREETING = b"HEAD / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n"


def within(seconds: float, action: Callable[[], _T]) -> _T:
    """Run an action for at most `seconds`, then raise TimeoutError and leave it running.

    For calls that can't be interrupted: DNS look-ups, libraries waiting in C.
    """
    done: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def act() -> None:
        try:
            done.set_result(action())
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            done.set_exception(error)

    threading.Thread(target=act, daemon=True).start()
    return done.result(timeout=seconds)


def prove_store(address: str, *, what: str) -> None:
    """Check that the server of an fsspec address answers; local paths and clouds' own stores pass.

    Raises InputError that starts with `what`.
    """
    if "://" not in address:
        return
    parts = Address.parse(address, what=what)
    scheme = _SAME.get(parts.scheme, parts.scheme)
    for variable in _ENDPOINTS.get(scheme, ()):
        if endpoint := os.environ.get(variable):
            server = Address.parse(endpoint, what=variable)
            if server.scheme not in ("http", "https") or not server.host:
                raise InputError(f"{variable} is {shown(endpoint)!r}; expected http://host:port or https://host:port")
            prove_server(server, what=f"{what} ({variable} is {shown(endpoint)!r})")
            return
    if scheme in _PORTS and parts.host:
        prove_server(parts, what=what)


def prove_server(server: Address, *, what: str, cure: str = "is the address right, and does it run?") -> None:
    """Check that a server, or its proxy, answers. Raises InputError from `what` to `cure`."""
    host, port, scheme = server.host, server.port or _PORTS.get(server.scheme, 80), server.scheme
    if scheme in ("http", "https") and (proxy := _proxy(scheme, host)):
        through = Address.parse(proxy if "://" in proxy else f"http://{proxy}", what=f"the proxy for {scheme}")
        host, port, scheme = through.host, through.port or 80, "proxy"
        what = f"{what}, through the proxy {host}:{port}"
    try:
        _answers(host, port, scheme)
    except OSError as error:
        raise InputError(f"{what}: nothing answers at {host}:{port} ({why(error)}); {cure}") from None


def prove_port(host: str, port: int, *, what: str, cure: str) -> None:
    """Check that a port is open. Raises InputError from `what` to `cure`."""
    try:
        connect(host, port).close()
    except OSError as error:
        raise InputError(f"{what}: nothing answers at {host}:{port} ({why(error)}); {cure}") from None


def connect(host: str, port: int) -> socket.socket:
    """Connect within seconds. Raises OSError (TimeoutError, gaierror, ConnectionRefusedError, …)."""
    found = within(_CONNECT_SECONDS, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    fault: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, place in found[:2]:
        made = socket.socket(family, kind, protocol)
        made.settimeout(_CONNECT_SECONDS)
        try:
            made.connect(place)
        except OSError as error:
            made.close()
            fault = error
        else:
            made.settimeout(_ANSWER_SECONDS)
            return made
    raise fault


def why(error: OSError) -> str:
    """A readable reason why nothing answers."""
    if isinstance(error, socket.gaierror):
        return "there is no host of that name"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused: nothing listens there"
    if isinstance(error, TimeoutError):
        return "it doesn't answer for seconds"
    return error.strerror or str(error) or type(error).__name__


@lru_cache
def _answers(host: str, port: int, scheme: str) -> None:
    """Wait for a server's first byte; only successes are cached."""
    with connect(host, port) as plain, contextlib.ExitStack() as stack:
        stream = plain
        if scheme == "https":
            # Whether the certificate is to be trusted is for those to judge who send something.
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            try:
                stream = stack.enter_context(context.wrap_socket(plain, server_hostname=host))
            except ssl.SSLError:
                raise OSError(f"what answers at port {port} doesn't speak TLS, so not https") from None
        if scheme in ("http", "https"):
            stream.sendall(_GREETING % host.encode("idna"))
        if scheme in ("http", "https", "ftp", "sftp", "ssh") and not stream.recv(1):
            raise ConnectionResetError(f"it ends the connection at once; does port {port} speak {scheme}?")


def _proxy(scheme: str, host: str) -> str | None:
    return None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme)
