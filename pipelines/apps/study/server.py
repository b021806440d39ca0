"""Serve a study's page on this machine alone.

It listens on the loopback address, refuses other host names (web pages could reach it through their own), reads no file
but the page and the study, accepts only JSON, which browsers send across origins only with the server's consent, and
closes connections whose requests don't arrive.
"""

import re
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import AfterValidator, BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from dreambooth.config.explain import plain_message
from dreambooth.errors import InputError
from dreambooth.evaluation.prompts import EvaluationPrompt
from pipelines.apps.page_policy import LOOPBACK_HOSTS, page_policy
from pipelines.apps.study.arrival import http_within
from pipelines.apps.study.store import StoredQuestion, StudyFile
from pipelines.report.pages import render

_LOOPBACK = "127.0.0.1"
_LARGEST_ANSWER = 4096  # bytes
_LONGEST_HEADERS = 16384  # bytes
_REQUEST_SECONDS = 60.0
_ENDING_SECONDS = 1
_RATER = re.compile(r"[^\x00-\x1f\x7f]{1,60}")
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_FOREVER = {"Cache-Control": "max-age=31536000, immutable"}
"""Caching of pictures, whose names are their hashes."""


def _check_rater(name: str) -> str:
    if not _RATER.fullmatch(name.strip()):
        raise ValueError("expected a rater's name of 1 to 60 characters")
    return name.strip()


Rater = Annotated[str, AfterValidator(_check_rater)]


class GivenAnswer(BaseModel):
    """An answer sent by the page."""

    rater: Rater
    question: int = Field(ge=1, le=2**31)
    aspect: Literal["subject", "prompt"]
    side: Literal["left", "right", "neither"]


def study_app(study: StudyFile) -> FastAPI:
    """The application: page, a rater's questions, pictures, and answers. Refusals are JSON with `error`."""
    app = FastAPI(title="study", docs_url=None, redoc_url=None, openapi_url=None)
    html = render("study.html", title="Which picture is better?")
    policy = page_policy(html)

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    @app.get("/questions")
    def questions(rater: Rater) -> list[dict[str, Any]]:
        return [_shown(question) for question in study.questions_for(rater)]

    @app.get("/pictures/{name}")
    def picture(name: str) -> Response:
        content = study.picture(name)
        if content is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "there is no such picture")
        return Response(content, media_type="image/png", headers=_FOREVER)

    @app.post("/answers")
    def answer(given: GivenAnswer) -> dict[str, Any]:
        try:
            study.answer(question=given.question, aspect=given.aspect, rater=given.rater, side=given.side)
        except ValueError as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, f"no answer: {error}") from None
        return {}

    app.middleware("http")(_guard)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(StarletteHTTPException)(_refused)
    return app


async def _guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuse other hosts and large or non-JSON bodies before reading them."""
    host = request.headers.get("host", "")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    length = request.headers.get("content-length", "0" if request.method == "GET" else "")
    if re.sub(r":\d+$", "", host) not in LOOPBACK_HOSTS:
        response = _error(HTTPStatus.FORBIDDEN, f"this is not {host[:100]!r}")
    elif request.method == "POST" and kind != "application/json":
        response = _error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"expected application/json, got {kind[:100]!r}")
    elif not length.isdecimal() or int(length) > _LARGEST_ANSWER:
        response = _error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected up to {_LARGEST_ANSWER} bytes")
    else:
        response = await call_next(request)
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return _error(HTTPStatus.BAD_REQUEST, f"no answer: {where}: {plain_message(first['msg'])}")


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return _error(HTTPStatus(error.status_code), error.detail)


def _error(status: HTTPStatus, reason: str) -> Response:
    return JSONResponse({"error": reason}, status)


class StudyServer:
    """Serves one study while it is open: `with StudyServer(study, port=8321) as server: print(server.url)`."""

    def __init__(self, study: StudyFile, *, port: int, request_seconds: float = _REQUEST_SECONDS) -> None:
        """Bind the port, 0 for any free one. Raises InputError if it is taken.

        A connection whose request takes longer than `request_seconds` to arrive is closed.
        """
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((_LOOPBACK, port))
            self._socket.listen()
        except (OSError, OverflowError) as error:
            self._socket.close()
            raise InputError(f"can't listen on port {port} ({error}); give another with --port, 0 for any") from None
        self.url = f"http://{_LOOPBACK}:{self._socket.getsockname()[1]}/"
        self._server = uvicorn.Server(
            uvicorn.Config(
                study_app(study),
                log_config=None,  # the terminal belongs to the study's owner
                log_level="critical",
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=_LONGEST_HEADERS,
                timeout_graceful_shutdown=_ENDING_SECONDS,
                http=http_within(request_seconds),
                ws="none",
                lifespan="off",
                proxy_headers=False,
            )
        )

    def __enter__(self) -> "StudyServer":
        """Start serving in a thread."""
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="study", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop serving and free the port."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def wait(self) -> None:
        """Wait until the process is interrupted."""
        self._thread.join()


def _shown(question: StoredQuestion) -> dict[str, Any]:
    """A question for the page; its prompt lacks the identifier, which means nothing to raters."""
    prompt = EvaluationPrompt(text=question.prompt, application="").without_identifier(question.class_noun)
    return asdict(question) | {"prompt": prompt}
