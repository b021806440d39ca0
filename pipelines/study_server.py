"""A study's page, on this machine alone.

It listens on the loopback address, answers to no other host's name (so that no page of the web can reach it by a name
of its own), reads no file but the page and the study, and takes answers as JSON only, which a browser sends to another
origin's server only after asking it.
"""

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from dreambooth.errors import InputError
from dreambooth.evaluation.prompts import EvaluationPrompt
from pipelines.page_policy import LOOPBACK_HOSTS, read_page
from pipelines.study_store import StoredQuestion, StudyFile

_PAGE = Path(__file__).with_name("study.html")
_LOOPBACK = "127.0.0.1"
_LARGEST_ANSWER = 4096  # bytes
_POLL_SECONDS = 0.05  # how long its end may take
_RATER = re.compile(r"[^\x00-\x1f\x7f]{1,60}")
_NONE: Mapping[str, str] = {}
_FOREVER = "max-age=31536000, immutable"  # a picture's name is its hash


class StudyServer:
    """Serves one study while it is open: `with StudyServer(study, port=8321) as server: print(server.url)`."""

    def __init__(self, study: StudyFile, *, port: int) -> None:
        """Take the port, 0 for any that is free; InputError when it is taken."""
        try:
            self._server = _Server((_LOOPBACK, port), _Requests)
        except (OSError, OverflowError) as error:
            raise InputError(f"can't listen on port {port} ({error}); give another with --port, 0 for any") from None
        self._server.study = study
        self.url = f"http://{_LOOPBACK}:{self._server.server_port}/"

    def __enter__(self) -> "StudyServer":
        """Answer from now on, in a thread of its own."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="study", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop, and give the port back."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def wait(self) -> None:
        """Until the process is interrupted."""
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    study: StudyFile

    @cached_property
    def page(self) -> tuple[bytes, str]:
        """The page and its policy."""
        html, policy = read_page(_PAGE)
        return html.encode(), policy


class _Requests(BaseHTTPRequestHandler):
    server: _Server
    timeout = 60  # seconds that a request may take to arrive
    server_version, sys_version = "dreambooth", ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, what: Callable[[], None]) -> None:
        try:
            host = self.headers.get("Host", "")
            if re.sub(r":\d+$", "", host) not in LOOPBACK_HOSTS:
                raise _RefusedError(HTTPStatus.FORBIDDEN, f"this is not {host[:100]!r}")
            what()
        except _RefusedError as refused:
            self._send(json.dumps({"error": refused.reason}).encode(), "application/json", status=refused.status)

    def _get(self) -> None:
        address = urlsplit(self.path)
        if address.path == "/":
            page, policy = self.server.page
            self._send(page, "text/html; charset=utf-8", {"Content-Security-Policy": policy})
        elif address.path == "/questions":
            rater = _rater(parse_qs(address.query).get("rater", [""])[0])
            questions = [_shown(question) for question in self.server.study.questions_for(rater)]
            self._send(json.dumps(questions).encode(), "application/json")
        elif address.path.startswith("/pictures/"):
            picture = self.server.study.picture(address.path.removeprefix("/pictures/"))
            if picture is None:
                raise _RefusedError(HTTPStatus.NOT_FOUND, "there is no such picture")
            self._send(picture, "image/png", {"Cache-Control": _FOREVER})
        else:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _post(self) -> None:
        if self.path != "/answers":
            raise _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")
        given = self._json()
        try:
            rater = _rater(given["rater"])
            number = int(given["question"])
            self.server.study.answer(question=number, aspect=given["aspect"], rater=rater, side=given["side"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, f"no answer: {error}") from None
        self._send(b"{}", "application/json")

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: the terminal belongs to whoever runs the study."""

    def _json(self) -> dict[str, Any]:
        kind, length = self.headers.get_content_type(), self.headers.get("Content-Length", "")
        if kind != "application/json":
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"expected application/json, got {kind}")
        if not length.isdecimal() or int(length) > _LARGEST_ANSWER:
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected up to {_LARGEST_ANSWER} bytes")
        try:
            value = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "expected JSON") from None
        if not isinstance(value, dict):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "expected an object")
        return value

    def _send(
        self, content: bytes, kind: str, more: Mapping[str, str] = _NONE, *, status: HTTPStatus = HTTPStatus.OK
    ) -> None:
        self.send_response(status)
        plain = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        for name, value in {**plain, **more}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def _rater(name: object) -> str:
    stripped = name.strip() if isinstance(name, str) else ""
    if not _RATER.fullmatch(stripped):
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "expected a rater's name of 1 to 60 characters")
    return stripped


def _shown(question: StoredQuestion) -> dict[str, Any]:
    """A question as the page gets it; the prompt without the identifier, which means nothing to a rater."""
    prompt = EvaluationPrompt(text=question.prompt, application="").without_identifier(question.class_noun)
    return asdict(question) | {"prompt": prompt}
