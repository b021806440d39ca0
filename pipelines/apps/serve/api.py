"""The HTTP side of `dreambooth serve`: a page, the list of subjects, and pictures. Independent of Ray."""

import base64
from collections.abc import Awaitable, Callable, Sequence

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dreambooth import __version__
from dreambooth.config.wording import check_wording
from dreambooth.errors import InputError
from pipelines.apps.page_policy import LOOPBACK_HOSTS, page_policy
from pipelines.apps.serve.description import describe_api
from pipelines.apps.serve.requests import MOST_BYTES, Asked, Drawn, Refused, read_request
from pipelines.apps.serve.subjects import ServedSubject
from pipelines.report.pages import render


class Made(BaseModel):
    """The answer to `Asked`."""

    subject: str
    model: str = Field(description="models:/NAME/VERSION")
    seeds: list[int]
    images: list[str] = Field(description="PNG files in base64, one per seed")
    warnings: list[str] = Field(description="ways in which the model may misread the prompt")


class Listed(BaseModel):
    """An available subject."""

    subject: str
    class_noun: str
    identifier: str
    model: str


_BODY = {"required": True, "content": {"application/json": {"schema": Asked.model_json_schema()}}}


def make_api(
    subjects: Sequence[ServedSubject], draw: Callable[[Asked], Awaitable[Drawn]], *, loopback: bool
) -> FastAPI:
    """Make the application; `draw` returns the pictures of a request or raises Refused."""
    api = FastAPI(
        title="DreamBooth",
        version=__version__,
        description="Pictures of subjects that models were fine-tuned on.",
        docs_url=None,  # FastAPI's page loads its script from elsewhere
        redoc_url=None,
    )
    if loopback:  # else web pages could reach it through their own host names
        api.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_HOSTS)
    known = {subject.name: subject for subject in subjects}
    html = render("serve.html", title="DreamBooth")
    policy = page_policy(html)

    @api.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    @api.get("/docs", include_in_schema=False)
    async def documented() -> HTMLResponse:
        example = {"subject": next(iter(known)), "prompt": "a photo of [V] in the snow", "num": 4}
        text = describe_api(api.openapi(), example)
        return HTMLResponse(text, headers={"Content-Security-Policy": page_policy(text)})

    @api.get("/healthz", summary="Whether it answers")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/subjects", summary="Subjects served")
    async def listed() -> list[Listed]:
        return [
            Listed(subject=one.name, class_noun=one.class_noun, identifier=one.identifier, model=one.address)
            for one in known.values()
        ]

    @api.post(
        "/generate",
        summary="Sample images",
        responses={404: {}, 422: {}, 429: {}, 503: {}},
        openapi_extra={"requestBody": _BODY},
    )
    async def generate(request: Request) -> Made:
        try:
            asked = read_request(await _body(request), request.headers.get("content-type", ""))
            subject = _find(known, asked.subject)
            check_wording(asked.prompt, what="the prompt", identifier=subject.identifier)
            drawn = await draw(asked)
        except InputError as error:
            raise HTTPException(422, str(error)) from None
        except Refused as refusal:
            again = {"Retry-After": "5"} if refusal.status in (429, 503) else None
            raise HTTPException(refusal.status, refusal.reason, headers=again) from None
        return Made(
            subject=asked.subject,
            model=subject.address,
            seeds=list(range(asked.seed, asked.seed + asked.num)),
            images=[base64.b64encode(image).decode() for image in drawn.images],
            warnings=list(drawn.warnings),
        )

    return api


async def _body(request: Request) -> bytes:
    """Read the body, up to the point where it is too long."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            break
    return body


def _find(known: dict[str, ServedSubject], name: str) -> ServedSubject:
    if name not in known:
        shown = ", ".join(sorted(known)[:10])
        raise Refused(404, f"there is no subject {name!r} here; there are {shown}")
    return known[name]
