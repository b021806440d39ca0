"""Settings of evaluation, and of the gate for a new champion."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from dreambooth.config.bounds import Count, Guidance, Number, SamplingSteps, Seed, Steps
from dreambooth.config.subject import Frozen, PromptTemplates, Subject, Words, as_tuple, fill_prompt
from dreambooth.config.wording import PROMPT_FIELDS, misplaced

FURTHER = ("dinov2", "dreamsim")
"""Encoders beside a bank's, by the settings that locate them."""


def _check_prompt(prompt: str) -> str:
    if fault := misplaced(prompt, known=PROMPT_FIELDS):
        raise ValueError(f"{prompt!r}: {fault}")
    return prompt


def _check_prompts(prompts: tuple[str, ...]) -> tuple[str, ...]:
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    if len({prompt.casefold() for prompt in prompts}) < len(prompts):  # text encoders read lower case
        raise ValueError(f"expected prompts that differ, got {list(prompts)}")
    return prompts


class EvaluationConfig(Frozen):
    """Samples for the eye, their similarities, and the figures of the paper's protocol."""

    later: ClassVar = FURTHER

    enabled: bool = Field(True, description="samples for the contact sheet, and their similarities; false: neither")
    prompts: Annotated[tuple[Annotated[Words, AfterValidator(_check_prompt)], ...], AfterValidator(_check_prompts)] = (
        Field(
            (
                "a photo of [V] {class_noun}",
                "a photo of [V] {class_noun} on the beach",
                "a photo of [V] {class_noun} in the snow",
                "a photo of [V] {class_noun} in the jungle",
                "a photo of [V] {class_noun} on a cobblestone street",
            ),
            description="prompts of the samples: [V] stands for the identifier, {class_noun} for the class noun",
        )
    )
    images_per_prompt: Count = Field(4, description="samples per prompt")
    num_inference_steps: SamplingSteps = Field(
        25, description="sampling steps of samples, and default of the registered model"
    )
    guidance_scale: Guidance = Field(
        7.5, description="classifier-free guidance of samples, and default of the registered model"
    )
    seed: Seed = Field(1, description="seed of the samples' noise, which also depends on prompt and sample")
    image_encoder: str | None = Field(
        None, description="ViT that measures similarities; null: the miniature's for it, else facebook/dino-vits16"
    )
    protocol: Literal["none", "auto", "dreambench", "miniature", "own"] = Field(
        "none",
        description="prompts to measure DINO, CLIP-I, CLIP-T, PRES and DIV on: DreamBench's 25, the miniature's 25 "
        "(auto: by base model), or evaluation.prompts (own)",
    )
    bank: Literal["auto", "paper", "miniature"] = Field(
        "auto",
        description="encoders of the protocol's figures; auto: the miniature's for the miniature, else the paper's",
    )
    dino: Words = Field("facebook/dino-vits16", description="DINO of the paper's bank: folder, address or hub id")
    clip: Words = Field(
        "openai/clip-vit-base-patch32", description="CLIP of the paper's bank: folder, address or hub id"
    )
    lpips: Words | None = Field(
        None,
        description="LPIPS of the paper's bank: folder with the weights of AlexNet and LPIPS, not on the hub",
    )
    dinov2: Words | None = Field(
        None,
        description="DINOv2 to measure beside the bank, in separate columns: folder, address or hub id, such as "
        "facebook/dinov2-small; null: not measured",
    )
    dreamsim: Words | None = Field(
        None,
        description="DreamSim to measure beside the bank, in separate columns: folder or address of the package "
        "dreamsim's cache_dir; null: not measured",
    )
    real_images: Annotated[tuple[str, ...] | None, BeforeValidator(as_tuple)] = Field(
        None, description="photographs of the subject to compare samples with; null: the instance images"
    )
    every: Steps | None = Field(
        None,
        description="steps between scores (DINO + CLIP-T on evaluation.prompts) during training; null: no scores",
    )
    score_images: Count = Field(2, description="samples per prompt of each score")

    def prompts_of(self, subject: Subject, templates: PromptTemplates) -> list[str]:
        """Fill in a subject's identifier, and its class noun if it was trained with one."""
        noun = templates.noun_beside_identifier(subject)
        return [fill_prompt(prompt, str(subject.identifier), noun) for prompt in self.prompts]


class GateConfig(Frozen):
    """Conditions for a new version to become its model's `champion`, on the protocol's figures of one bank."""

    dino_margin: Number = Field(
        0.02, ge=0, le=2, description="most by which a new champion's DINO may be below the old one's"
    )
    clip_t_margin: Number = Field(
        0.01, ge=0, le=2, description="most by which a new champion's CLIP-T may be below the old one's"
    )
    pres_limit: Number = Field(0.6, gt=-1, le=1, description="upper limit, exclusive, of a new champion's PRES")
