"""The pictures that a model's figures are measured on (paper, section 4.1), and their keys.

Four kinds: the fine-tuned model's of every prompt, the base model's of every prompt without the identifier, and either
model's of the class prompt, for PRES. Samples for the eye are such pictures of fewer prompts. A set's key covers
everything that decides its pixels, so pictures are reused: by a resumed run, for another bank of encoders, and, for the
base model's, by other subjects of the class.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.evaluation.prompts import OWN, EvaluationPrompt, PromptList, prompt_list, sample_seed
from dreambooth.miniature import BASES
from dreambooth.sampling.class_images import STORED

CLASS_SAMPLES, CLASS_SAMPLES_FOR_THE_EYE = 4, 2
"""Samples of the class prompt, as a multiple of those of any other."""
FOR_THE_EYE = "samples"
"""The list of prompts of samples for the eye, by name."""
SAMPLED_TOGETHER = 8
"""Most pictures sampled together, in whole prompts, at least one: two at a time take a fourth longer, even on a CPU."""


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Pictures of one model, sampled together; `model` is the hash of its weights or of their recipe."""

    model: str
    prompts: tuple[str, ...]  # of each picture
    seeds: tuple[int, ...]
    num_inference_steps: int
    guidance_scale: float
    resolution: int
    dtype: str
    sampler: str

    @property
    def key(self) -> str:
        """Content address: 20 hex digits of the sha256 over all fields and `class_images.STORED`."""
        return _digest(asdict(self) | {"stored": STORED})


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """All pictures of one subject, for any model."""

    prompts: PromptList
    identifier: str
    class_noun: str
    noun_beside_identifier: str  # "" for a model that was taught without
    class_prompt: str
    images_per_prompt: int
    class_images: int
    num_inference_steps: int
    guidance_scale: float
    resolution: int
    seed: int
    dtype: str
    sampler: str

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts with the identifier."""
        noun = self.noun_beside_identifier
        return tuple(prompt.with_identifier(self.identifier, noun) for prompt in self.prompts.prompts)

    @property
    def texts_without_identifier(self) -> tuple[str, ...]:
        """The prompts of any member of the class."""
        return tuple(prompt.without_identifier(self.class_noun) for prompt in self.prompts.prompts)

    @property
    def prompts_key(self) -> str:
        """Key of prompts, number of pictures and noise; figures with the same key are comparable."""
        texts = [prompt.text for prompt in self.prompts.prompts]
        return _digest([texts, self.images_per_prompt, self.seed])

    def fine_tuned(self, model: str) -> tuple[SampleSet, ...]:
        """Pictures of every prompt by the fine-tuned model."""
        return self._sets(model, self.texts)

    def base(self, model: str) -> tuple[SampleSet, ...]:
        """Pictures of every prompt without the identifier by the base model, from the same noise."""
        return self._sets(model, self.texts_without_identifier)

    def of_class(self, model: str) -> SampleSet:
        """Pictures of the class prompt by either model."""
        return self._set(model, [(self.class_prompt, self.class_prompt)], self.class_images)

    def _sets(self, model: str, texts: Sequence[str]) -> tuple[SampleSet, ...]:
        """Pictures of every prompt, in its order."""
        prompts = list(zip(texts, self.texts_without_identifier, strict=True))
        at_once = max(1, SAMPLED_TOGETHER // self.images_per_prompt)
        return tuple(
            self._set(model, prompts[first : first + at_once], self.images_per_prompt)
            for first in range(0, len(prompts), at_once)
        )

    def _set(self, model: str, prompts: Sequence[tuple[str, str]], count: int) -> SampleSet:
        """`count` pictures of each (prompt, prompt without identifier); the second decides the noise."""
        return SampleSet(
            model=model,
            prompts=tuple(text for text, _ in prompts for _ in range(count)),
            seeds=tuple(sample_seed(self.seed, plain, image) for _, plain in prompts for image in range(count)),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            resolution=self.resolution,
            dtype=self.dtype,
            sampler=self.sampler,
        )


def protocol_of(config: DreamBoothConfig, *, dtype: str, sampler: str) -> Protocol | None:
    """The protocol of a configuration, or None; `dtype` is that of sampling, `sampler` the family's `sampler_name`.

    Raises InputError for unusable prompts of the user's own.
    """
    settings = config.evaluation
    if settings.protocol == "none":
        return None
    name, noun = named(settings.protocol, config.base_model), config.subject.class_noun
    prompts = prompt_list(name, noun, own=settings.prompts)
    return _protocol(config, prompts, class_samples=CLASS_SAMPLES, dtype=dtype, sampler=sampler)


def samples_of(config: DreamBoothConfig, *, dtype: str, sampler: str) -> Protocol | None:
    """The pictures of `evaluation.prompts`, for the eye, as `protocol_of`; None where none are asked for."""
    if not config.evaluation.enabled:
        return None
    texts = config.evaluation.prompts
    prompts = PromptList(
        name=FOR_THE_EYE, source=OWN, prompts=tuple(EvaluationPrompt(text=text, application=OWN) for text in texts)
    )
    return _protocol(config, prompts, class_samples=CLASS_SAMPLES_FOR_THE_EYE, dtype=dtype, sampler=sampler)


def _protocol(
    config: DreamBoothConfig, prompts: PromptList, *, class_samples: int, dtype: str, sampler: str
) -> Protocol:
    settings, subject = config.evaluation, config.subject
    return Protocol(
        prompts=prompts,
        identifier=str(subject.identifier),
        class_noun=subject.class_noun,
        noun_beside_identifier=config.prompts.noun_beside_identifier(subject),
        class_prompt=config.prompts.class_prompt(subject),
        images_per_prompt=settings.images_per_prompt,
        class_images=class_samples * settings.images_per_prompt,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        resolution=int(config.images.resolution or 0),
        seed=settings.seed,
        dtype=dtype,
        sampler=sampler,
    )


def named(protocol: str, base_model: str) -> str:
    """The name of a protocol's prompts; `auto` depends on the base model."""
    if protocol != "auto":
        return protocol
    return "miniature" if base_model in BASES else "dreambench"


def _digest(value: dict[str, object] | Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]
