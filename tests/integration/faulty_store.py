"""A proxy on loopback that stands before an object store, or MLflow, and answers for it when it is to misbehave."""

import contextlib
import http.client
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_BUSY = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>'
_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class FaultyStore:
    """Counts calls and those that were answered with 503."""

    def __init__(self, upstream: str, every: int) -> None:
        self.upstream, self.every = urlsplit(upstream).netloc, every
        self.calls = self.refused = 0
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def fate(self) -> str:
        """What becomes of the next call: one in `every` gets a 503, every second of those after it was carried out."""
        with self._lock:
            self.calls = next(self._numbers)
            if self.calls % self.every:
                return "passes"
            self.refused += 1
            return "refused" if self.refused % 2 else "answer lost"


@contextmanager
def faulty_store(upstream: str, *, every: int) -> Iterator[tuple[str, FaultyStore]]:
    """Within, an address that leads to the store at `upstream`, where one call in `every` fails."""
    store = FaultyStore(upstream, every)
    with faulty_proxy(store.upstream, store.fate) as address:
        yield address, store


@contextmanager
def faulty_proxy(
    upstream: str, fate: Callable[[], str], *, seen: Callable[[str], None] = lambda call: None
) -> Iterator[str]:
    """Within, an address that leads to HOST:PORT, where `fate` says what becomes of each call.

    It "passes", is "refused" (503) or has its "answer lost" (carried out, and 503); "silent" is never answered, "gone"
    hung up on, "late" after four seconds, and a number answers with that status. Before, `seen` gets "METHOD /path".
    """
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def relay(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen(f"{self.command} {self.path}")
            becomes = fate()
            if becomes == "silent":
                closing.wait()
                return
            if becomes == "gone":
                self.close_connection = True
                return
            if becomes == "refused" or becomes.isdigit():
                self.answer(int(becomes) if becomes.isdigit() else 503, {"Content-Type": "application/xml"}, _BUSY)
                return
            if becomes == "late":
                closing.wait(4)
            connection = http.client.HTTPConnection(upstream, timeout=60)
            try:
                # With its own Host, which the signature is made over.
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        connection.putheader(name, value)
                connection.endheaders(body)
                got = connection.getresponse()
                content, headers = got.read(), {k: v for k, v in got.getheaders() if k.lower() not in _BY_HOP}
                length = got.getheader("Content-Length") if self.command == "HEAD" else None
            finally:
                connection.close()
            if becomes == "answer lost":
                self.answer(503, {"Content-Type": "application/xml"}, _BUSY)
            else:
                self.answer(got.status, headers, content, length)

        do_GET = do_PUT = do_POST = do_PATCH = do_HEAD = do_DELETE = relay

        def answer(self, status: int, headers: dict[str, str], content: bytes, length: str | None = None) -> None:
            with contextlib.suppress(ConnectionError):  # who asked did not wait for the answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
