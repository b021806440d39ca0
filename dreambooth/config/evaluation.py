"""What a run is told of its evaluation, and of what a model has to reach to become the champion."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from dreambooth.config.bounds import Count, Guidance, Number, SamplingSteps, Seed, Steps
from dreambooth.config.subject import Frozen, PromptTemplates, Subject, Words, as_tuple, fill_prompt
from dreambooth.config.wording import PROMPT_FIELDS, misplaced


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
    """The samples a person looks at, the similarities measured on them, and the figures of the paper's protocol."""

    enabled: bool = Field(True, description="false: no samples for the contact sheet, and no similarities")
    prompts: Annotated[tuple[Annotated[Words, AfterValidator(_check_prompt)], ...], AfterValidator(_check_prompts)] = (
        Field(
            (
                "a photo of [V] {class_noun}",
                "a photo of [V] {class_noun} on the beach",
                "a photo of [V] {class_noun} in the snow",
                "a photo of [V] {class_noun} in the jungle",
                "a photo of [V] {class_noun} on a cobblestone street",
            ),
            description="[V] stands for the identifier, {class_noun} for the class noun",
        )
    )
    images_per_prompt: Count = Field(4, description="samples per prompt")
    num_inference_steps: SamplingSteps = Field(25, description="sampling steps; of the registered model too")
    guidance_scale: Guidance = Field(7.5, description="classifier-free guidance; of the registered model too")
    seed: Seed = Field(1, description="of the first sample of a prompt; the next have the next seeds")
    image_encoder: str | None = Field(
        None, description="ViT for similarities; None: the miniature's for the miniature, else facebook/dino-vits16"
    )
    protocol: Literal["none", "auto", "dreambench", "miniature", "own"] = Field(
        "none",
        description="measure DINO, CLIP-I, CLIP-T, PRES, DIV on 25 prompts: DreamBench's or the miniature's (auto: by "
        "base model), or on evaluation.prompts (own)",
    )
    bank: Literal["auto", "paper", "miniature"] = Field(
        "auto", description="encoders of the protocol's figures; auto: the miniature's for the miniature"
    )
    dino: Words = Field("facebook/dino-vits16", description="of the paper's bank: folder, address or hub id")
    clip: Words = Field("openai/clip-vit-base-patch32", description="of the paper's bank: folder, address or hub id")
    lpips: Words | None = Field(
        None, description="of the paper's bank: folder with the weights of AlexNet and of LPIPS, which no hub has"
    )
    real_images: Annotated[tuple[str, ...] | None, BeforeValidator(as_tuple)] = Field(
        None, description="pictures of the subject that samples are compared with; None: the instance images"
    )
    every: Steps | None = Field(
        None,
        description="steps between measurements of the score during training, the bank's DINO + CLIP-T of "
        "evaluation.prompts; None: not measured",
    )
    score_images: Count = Field(2, description="samples per prompt of such a measurement")

    def prompts_of(self, subject: Subject, templates: PromptTemplates) -> list[str]:
        """The prompts with a subject's identifier put in, and its class noun if it was taught with one."""
        noun = templates.noun_beside_identifier(subject)
        return [fill_prompt(prompt, str(subject.identifier), noun) for prompt in self.prompts]


class GateConfig(Frozen):
    """When a new version of a registered model becomes its `champion`: by the protocol's figures, of one bank."""

    dino_margin: Number = Field(0.02, ge=0, le=2, description="how much lower its DINO may be than the champion's")
    clip_t_margin: Number = Field(0.01, ge=0, le=2, description="how much lower its CLIP-T may be than the champion's")
    pres_limit: Number = Field(0.6, gt=-1, le=1, description="its PRES has to be lower than this")
