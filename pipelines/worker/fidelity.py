"""The score of weights during training: few samples, measured like the final evaluation."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.data.images import InstanceImage
from dreambooth.evaluation.prompts import sample_seed
from dreambooth.models.cascade import SUPER_RESOLUTION
from dreambooth.training.best_checkpoint import Score, Scores
from pipelines.cluster.collectives import from_rank_zero
from pipelines.stages.evaluation_task import bank_address
from pipelines.stages.photographs import read_photographs
from pipelines.tasks import SampleRequest, Source, base_source
from pipelines.worker.samplers import ImageSampler

if TYPE_CHECKING:
    from pipelines.tasks import TrainTask


@dataclass(frozen=True, kw_only=True)
class FirstStage:
    """The trained first stage of a cascade whose second one is scored; `published` gives its weights on rank 0."""

    task: "TrainTask"
    published: Callable[[], Mapping[str, Any]]


class FidelityScorer:
    """Samples `evaluation.prompts` with given weights, `evaluation.score_images` each, from the same noise every time.

    It keeps a pipeline and the bank's encoders on the device. Given a `first` stage, weights are those of a cascade's
    second, which scales up the first one's pictures: they stay the same, so they are sampled once.
    """

    def __init__(
        self,
        config: DreamBoothConfig,
        images: Sequence[InstanceImage],
        *,
        key: str,
        base_hash: str,
        dtype: str,
        device: str,
        first: FirstStage | None = None,
    ) -> None:
        """Load the encoders and embed the instance images; `key` names the weights to come, sampled in `dtype`.

        Of a cascade all but `key` is the first stage's.
        """
        import torch

        evaluation = config.evaluation
        self._key = key
        self._base = base_source(config, base_hash)
        self._bank = bank_address(evaluation, config.base_model)
        self._prompts = [
            p for p in evaluation.prompts_of(config.subject, config.prompts) for _ in range(evaluation.score_images)
        ]
        places = list(range(evaluation.score_images)) * len(evaluation.prompts)
        self._request = SampleRequest(
            prompts=tuple(self._prompts),
            seeds=tuple(
                sample_seed(evaluation.seed, prompt, place) for prompt, place in zip(self._prompts, places, strict=True)
            ),
            num_inference_steps=evaluation.num_inference_steps,
            guidance_scale=evaluation.guidance_scale,
            resolution=int(config.images.resolution or 0),
            dtype=dtype,
        )
        self._sampler = ImageSampler(
            use_gpu=device != "cpu", num_threads=torch.get_num_threads(), graph=config.cluster.graph_sampling
        )
        side, self._of, self._small = self._request.resolution, "", list[bytes]()
        if first is not None:
            side, self._of = config.picture_side, f"{SUPER_RESOLUTION}."
            self._small = self._drawn_by(first)
            # With the base's text encoder: a second stage that reads text has it from a first one that left it frozen.
            self._base = replace(first.task.tuned_base, only_second=True)
        real = read_photographs(config, images, side)
        self._instance = self._sampler.seen(real.squares, self._bank).embeddings
        self._texts = self._sampler.texts(self._prompts, self._bank)

    def score(self, step: int, state: dict[str, Any]) -> Score:
        """Measure an engine's state_dict after a step."""
        from dreambooth.evaluation.metrics import clip_t
        from dreambooth.evaluation.similarity import mean_pairwise_similarity

        source = Source(address=f"trained:{self._key}@{step}")
        self._sampler.give_weights(source, self._base, {f"{self._of}{name}": one for name, one in state.items()})
        pictures = self._sampler.samples(source, self._request, self._small)
        samples = self._sampler.seen(pictures, self._bank).embeddings
        assert samples.clip is not None  # the banks of scores have one
        return Score(
            step=step,
            dino=mean_pairwise_similarity(samples.dino, self._instance.dino),
            clip_t=clip_t(samples.clip, self._texts),
        )

    def _drawn_by(self, first: FirstStage) -> list[bytes]:
        """The small pictures. What drew them is freed, as the second stage is trained on the same device."""
        source = Source(address=f"trained:{first.task.key}")
        self._sampler.give_weights(source, self._base, dict(first.published()))
        small = self._sampler.samples(source, self._request)
        self._sampler.unload()
        gc.collect()  # modules hold themselves in circles
        return small


class Scoring:
    """Measures the score on rank 0 and broadcasts it."""

    def __init__(self, task: "TrainTask", engine: Any, device: str, first: FirstStage | None = None) -> None:
        """Load the encoders, if scores are measured; `first` was trained before a second stage."""
        self._engine, self._keep = engine, task.config.train.keep == "best"
        self._scorer: FidelityScorer | None = None
        if task.config.evaluation.every is not None and engine.rank == 0:
            drawn = task if first is None else first.task
            self._scorer = FidelityScorer(
                drawn.config,
                drawn.images,
                key=task.key,
                base_hash=drawn.base_hash,
                dtype=drawn.sampling_dtype,
                device=device,
                first=first,
            )

    def measure(self, step: int, scores: Scores) -> Score:
        """Score the current weights and record it. Collective: call on every rank.

        Raises Diverged, on every rank, for non-finite weights.
        """
        state = self._engine.state_dict()
        measured = self._scorer.score(step, state) if self._scorer is not None else None
        score: Score = from_rank_zero(self._engine, measured)
        keeps = self._keep and self._engine.rank == 0
        scores.add(score, (lambda: state) if keeps else None)
        return score
