"""The service of `dreambooth serve`, on Ray Serve.

One deployment answers HTTP, the other samples. The sampler keeps a few subjects loaded (Serve's multiplexing also
routes a subject's requests to a replica that has it), batches waiting requests, and limits its queue.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from dreambooth.config.bounds import Graph
from pipelines.apps.serve.api import make_api
from pipelines.apps.serve.requests import Asked, Drawn, Refused
from pipelines.apps.serve.sampler import LoadedSubject, SubjectSampler, alike
from pipelines.apps.serve.subjects import ServedSubject

_TOGETHER_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Limits of a service: `subjects_loaded` and `batch` per replica, and the length of the `queue`.

    `graph` as `cluster.graph_sampling`.
    """

    base_shared: bool
    replicas: int
    subjects_loaded: int
    batch: int
    queue: int
    use_gpu: bool
    loopback: bool
    graph: Graph = "off"


def application(subjects: Sequence[ServedSubject], tracking_uri: str, settings: ServeSettings) -> Any:
    """The application for `serve.run`."""
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
            self._sampler = SubjectSampler(
                subjects, tracking_uri, base_shared=settings.base_shared, device=device, graph=settings.graph
            )
            self._turn = asyncio.Lock()

        @serve.multiplexed(max_num_models_per_replica=settings.subjects_loaded)  # type: ignore[untyped-decorator]
        async def load(self, name: str) -> LoadedSubject:
            return await asyncio.to_thread(self._sampler.load, name)

        @serve.batch(max_batch_size=settings.batch, batch_wait_timeout_s=_TOGETHER_SECONDS)
        async def sample(self, asked: list[Asked]) -> list[Drawn | Refused]:
            answers: dict[int, Drawn | Refused] = {}
            # Serve calls this concurrently for a batch's subjects. They share the base's components, and a waiting one
            # would be loaded beyond subjects_loaded, so one at a time loads and samples.
            async with self._turn:
                for places in alike(asked):
                    group = [asked[place] for place in places]
                    answers.update(zip(places, await self._drawn(group), strict=True))
            return [answers[place] for place in range(len(asked))]

        async def _drawn(self, group: list[Asked]) -> Sequence[Drawn | Refused]:
            """Answers to a group of requests for one subject; its failure doesn't affect other groups."""
            name = group[0].subject
            try:
                loaded = await self.load(name)
            except Exception as error:  # noqa: BLE001 - MLflow's, a store's, a base that is another one by now
                return [Refused(503, f"{name} can't be loaded: {_first_line(error)}")] * len(group)
            try:
                return await asyncio.to_thread(self._sampler.sample, loaded, group)
            except Exception as error:  # noqa: BLE001 - every request gets an answer
                return [Refused(500, f"sampling {name} failed: {_first_line(error)}")] * len(group)

    return Sampler


def _front(subjects: Sequence[ServedSubject], settings: ServeSettings) -> Any:
    @serve.deployment(name="front", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
    @serve.ingress()
    class Front:
        def __init__(self, sampler: Any) -> None:
            self._sampler = sampler

        def __serve_build_asgi_app__(self) -> Any:
            return make_api(subjects, self._draw, loopback=settings.loopback)

        async def _draw(self, asked: Asked) -> Drawn:
            try:
                answer = await self._sampler.options(multiplexed_model_id=asked.subject).sample.remote(asked)
            except BackPressureError:
                raise Refused(429, "too many wait already; try again") from None
            except RayActorError:
                raise Refused(503, "the sampling process died and is being restarted; try again later") from None
            if isinstance(answer, Refused):
                raise answer
            drawn: Drawn = answer
            return drawn

    return Front


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
