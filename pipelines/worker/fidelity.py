"""The score of weights during training: few samples, measured like the final evaluation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.data.images import InstanceImage
from dreambooth.evaluation.prompts import sample_seed
from dreambooth.training.best_checkpoint import Score, Scores
from pipelines.cluster.collectives import from_rank_zero
from pipelines.stages.evaluate_stage import instance_pictures
from pipelines.stages.protocol_task import bank_address
from pipelines.tasks import SampleRequest, Source, base_source
from pipelines.worker.samplers import ImageSampler

if TYPE_CHECKING:
    from pipelines.tasks import TrainTask


class FidelityScorer:
    """Samples `evaluation.prompts` with given weights, `evaluation.score_images` each, from the same noise every time.

    It keeps a pipeline and the bank's encoders on the device.
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
    ) -> None:
        """Load the encoders and embed the instance images; `key` names the weights to come, sampled in `dtype`."""
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
        real = instance_pictures(config, images, self._request.resolution)
        self._instance = self._sampler.seen(real, self._bank).embeddings
        self._texts = self._sampler.texts(self._prompts, self._bank)

    def score(self, step: int, state: dict[str, Any]) -> Score:
        """Measure an engine's state_dict after a step."""
        from dreambooth.evaluation.metrics import clip_t
        from dreambooth.evaluation.similarity import mean_pairwise_similarity

        source = Source(address=f"trained:{self._key}@{step}")
        self._sampler.give_weights(source, self._base, state)
        samples = self._sampler.seen(self._sampler.samples(source, self._request), self._bank).embeddings
        return Score(
            step=step,
            dino=mean_pairwise_similarity(samples.dino, self._instance.dino),
            clip_t=clip_t(samples.clip, self._texts),
        )


class Scoring:
    """Measures the score on rank 0 and broadcasts it."""

    def __init__(self, task: "TrainTask", engine: Any, device: str) -> None:
        """Load the encoders, if scores are measured."""
        self._engine, self._keep = engine, task.config.train.keep == "best"
        self._scorer: FidelityScorer | None = None
        if task.config.evaluation.every is not None and engine.rank == 0:
            self._scorer = FidelityScorer(
                task.config,
                task.images,
                key=task.key,
                base_hash=task.base_hash,
                dtype=task.sampling_dtype,
                device=device,
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
