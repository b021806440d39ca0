"""Sample many subjects in one process: the base stays loaded, subjects add denoiser and text encoder."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.config.bounds import Graph
from dreambooth.config.subject import fill_identifier
from dreambooth.data.images import png_bytes
from dreambooth.data.prompt_checks import PromptReader
from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.text_readers import readers_of_pipeline
from pipelines.apps.serve.requests import Asked, Drawn, Refused
from pipelines.apps.serve.subjects import ServedSubject
from pipelines.cluster.logs import log


@dataclass(frozen=True, kw_only=True)
class LoadedSubject:
    """A loaded subject, and its registered sampling settings."""

    subject: ServedSubject
    pipeline: Any
    settings: Mapping[str, Any]

    @property
    def resolution(self) -> int | None:
        """Training resolution in pixels, by its signature or version; None if unknown."""
        return int(self.settings.get("height") or 0) or self.subject.resolution


class SubjectSampler:
    """Loads and samples subjects. Not thread-safe: subjects share the base's components."""

    def __init__(
        self,
        subjects: Sequence[ServedSubject],
        tracking_uri: str,
        *,
        base_shared: bool,
        device: str,
        graph: Graph = "off",
    ) -> None:
        import torch

        from dreambooth.quiet import quiet
        from dreambooth.sampling.graphs import graphs_for

        quiet()
        self._graphs = graphs_for(graph, device, lambda reason: log("sampling not graphed", reason=reason))
        self._subjects = {subject.name: subject for subject in subjects}
        self._tracking_uri, self._base_shared, self._device = tracking_uri, base_shared, device
        self._dtype = torch.float16 if device == "cuda" else torch.float32
        self._bases: dict[str, Any] = {}

    def load(self, name: str) -> LoadedSubject:
        """Fetch a subject's weights, from its publication or the registry."""
        import mlflow.artifacts
        from mlflow.models import Model

        from dreambooth.sampling.sampler import load_pipeline, personalized
        from pipelines.tracking.client import default_tracking, quietly

        subject = self._subjects[name]
        with tempfile.TemporaryDirectory(prefix="dreambooth-serve-") as folder:
            with quietly(), default_tracking(self._tracking_uri):
                from pipelines.tracking.served_model import model_directory

                package = Path(mlflow.artifacts.download_artifacts(subject.address, dst_path=folder))
                model = Model.load(str(package))
            with model_directory(package / "artifacts" / "pipeline", model.flavors["python_function"]["config"]) as at:
                if self._base_shared:
                    pipeline = personalized(self._base(subject), at)
                else:
                    pipeline = load_pipeline(at, device=self._device, dtype=self._dtype)
        settings = {each.name: each.default for each in model.signature.params}
        return LoadedSubject(subject=subject, pipeline=pipeline, settings=settings)

    def _base(self, subject: ServedSubject) -> Any:
        from dreambooth.sampling.sampler import load_pipeline

        if subject.base_hash not in self._bases:
            base = resolve_base_model(subject.base_model)
            if base.hash != subject.base_hash:
                raise RuntimeError(
                    f"{subject.name} was made from {subject.base_model} of hash {subject.base_hash}, and here it has "
                    f"hash {base.hash}; put the other one here, or serve with --no-base-shared"
                )
            self._bases[base.hash] = load_pipeline(base.directory, device=self._device, dtype=self._dtype, alone=True)
        return self._bases[subject.base_hash]

    def sample(self, loaded: LoadedSubject, asked: Sequence[Asked]) -> list[Drawn | Refused]:
        """Answer requests for one subject with equal steps and guidance, sampled together."""
        read = [self._read(loaded, one) for one in asked]
        drawn = [one for one, reading in zip(asked, read, strict=True) if not isinstance(reading, Refused)]
        pictures = iter(self._pictures(loaded, drawn) if drawn else [])
        return [
            reading
            if isinstance(reading, Refused)
            else Drawn(images=tuple(next(pictures) for _ in range(one.num)), warnings=reading)
            for one, reading in zip(asked, read, strict=True)
        ]

    def _pictures(self, loaded: LoadedSubject, asked: Sequence[Asked]) -> list[bytes]:
        from dreambooth.sampling.sampler import sample_each

        return sample_each(
            png_bytes,
            loaded.pipeline,
            [fill_identifier(one.prompt, loaded.subject.identifier) for one in asked for _ in range(one.num)],
            [one.seed + place for one in asked for place in range(one.num)],
            num_inference_steps=asked[0].num_inference_steps or int(loaded.settings["num_inference_steps"]),
            guidance_scale=asked[0].guidance_scale or float(loaded.settings["guidance_scale"]),
            height=loaded.resolution,
            width=loaded.resolution,
            graphs=self._graphs,
        )

    @staticmethod
    def _read(loaded: LoadedSubject, asked: Asked) -> tuple[str, ...] | Refused:
        """Warnings about a prompt, or its refusal."""
        reader = PromptReader(readers=readers_of_pipeline(loaded.pipeline), identifier=loaded.subject.identifier)
        try:
            return reader.check(asked.prompt, what="the prompt", whole=True)
        except InputError as error:
            return Refused(422, str(error))


def alike(asked: Sequence[Asked]) -> list[list[int]]:
    """Group the indices of requests that can be sampled together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, one in enumerate(asked):
        groups.setdefault((one.subject, one.num_inference_steps, one.guidance_scale), []).append(place)
    return list(groups.values())
