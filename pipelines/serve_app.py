"""The HTTP service of `dreambooth serve`, on Ray Serve.

One deployment answers HTTP, the other samples: it keeps a few subjects loaded (Serve's multiplexing, which also sends a
subject's requests to a replica that has it), takes waiting requests together, and has a queue with an end.
"""

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field
from ray import serve
from ray.serve.exceptions import BackPressureError
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dreambooth import __version__
from pipelines.page_policy import LOOPBACK_HOSTS, read_page
from pipelines.serve_sampler import Asked, LoadedSubject, SubjectSampler, alike
from pipelines.serve_subjects import ServedSubject

_TOGETHER_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How much a service takes: `subjects_loaded` and `batch` a replica, `queue` requests that wait."""

    base_shared: bool
    replicas: int
    subjects_loaded: int
    batch: int
    queue: int
    use_gpu: bool
    loopback: bool


class Made(BaseModel):
    """The answer to `Asked`."""

    subject: str
    model: str = Field(description="models:/NAME/VERSION")
    seeds: list[int]
    images: list[str] = Field(description="PNG files in base64, one a seed")


class Listed(BaseModel):
    """A subject that can be asked for."""

    subject: str
    class_noun: str
    identifier: str
    model: str


def application(subjects: Sequence[ServedSubject], tracking_uri: str, settings: ServeSettings) -> Any:
    """What `serve.run` takes."""
    sampler = _sampler(subjects, tracking_uri, settings)
    return _front(subjects, settings).bind(sampler.bind())


def _sampler(subjects: Sequence[ServedSubject], tracking_uri: str, settings: ServeSettings) -> Any:
    device = "cuda" if settings.use_gpu else "cpu"

    @serve.deployment(
        name="sampler",
        num_replicas=settings.replicas,
        max_ongoing_requests=2 * settings.batch,  # those being sampled, and the next
        max_queued_requests=settings.queue,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if settings.use_gpu else 0},
    )
    class Sampler:
        def __init__(self) -> None:
            self._sampler = SubjectSampler(subjects, tracking_uri, base_shared=settings.base_shared, device=device)

        @serve.multiplexed(max_num_models_per_replica=settings.subjects_loaded)  # type: ignore[untyped-decorator]
        async def load(self, name: str) -> LoadedSubject:
            return await asyncio.to_thread(self._sampler.load, name)

        @serve.batch(max_batch_size=settings.batch, batch_wait_timeout_s=_TOGETHER_SECONDS)
        async def sample(self, asked: list[Asked]) -> list[Any]:
            answers: list[Any] = [None] * len(asked)
            for places in alike(asked):
                group = [asked[place] for place in places]
                loaded = await self.load(group[0].subject)
                made = await asyncio.to_thread(self._sampler.sample, loaded, group)
                for place, images in zip(places, made, strict=True):
                    answers[place] = images
            return answers

    return Sampler


def _front(subjects: Sequence[ServedSubject], settings: ServeSettings) -> Any:
    api = FastAPI(title="DreamBooth", version=__version__, description="Pictures of subjects that models were taught.")
    if settings.loopback:  # or a page of the web could reach it by a name of its own
        api.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_HOSTS)
    known = {subject.name: subject for subject in subjects}
    html, policy = read_page(Path(__file__).with_name("serve.html"))

    @serve.deployment(name="front", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
    @serve.ingress(api)
    class Front:
        def __init__(self, sampler: Any) -> None:
            self._sampler = sampler

        @api.get("/", include_in_schema=False)
        async def page(self) -> HTMLResponse:
            return HTMLResponse(html, headers={"Content-Security-Policy": policy})

        @api.get("/healthz", summary="Whether it answers")
        async def health(self) -> dict[str, str]:
            return {"status": "ok"}

        @api.get("/subjects", summary="Whom it can be asked for")
        async def listed(self) -> list[Listed]:
            return [
                Listed(subject=one.name, class_noun=one.class_noun, identifier=one.identifier, model=one.address)
                for one in known.values()
            ]

        @api.post("/generate", summary="Sample images", responses={404: {}, 429: {}})
        async def generate(self, asked: Asked) -> Made:
            if asked.subject not in known:
                shown = ", ".join(sorted(known)[:10])
                raise HTTPException(404, f"there is no subject {asked.subject!r} here; there are {shown}")
            try:
                images = await self._sampler.options(multiplexed_model_id=asked.subject).sample.remote(asked)
            except BackPressureError:
                raise HTTPException(429, "too many wait already; try again", headers={"Retry-After": "5"}) from None
            return Made(
                subject=asked.subject,
                model=known[asked.subject].address,
                seeds=list(range(asked.seed, asked.seed + asked.num)),
                images=[base64.b64encode(image).decode() for image in images],
            )

    return Front
