"""The figures of the paper on one model: sample, embed, measure, and write evaluation.json beside the model.

DINO's embeddings are stored with it, for what compares subjects with each other.

Samplers embed their own pictures, so pictures travel only to storage, under keys of all that decides their pixels
(`dreambooth.evaluation.protocol`): the fine-tuned model's in its run, the base model's beside the class images, for
all subjects of the class. An unfinished evaluation samples missing pictures; a finished one is found by its key.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dreambooth.config.evaluation import FURTHER
from dreambooth.config.settings import DreamBoothConfig
from dreambooth.data.inspection import Inspect, Inspection, inspect_addresses
from dreambooth.errors import InputError
from dreambooth.evaluation.protocol import SampleSet, protocol_of
from pipelines.stages.embeddings import store_embeddings
from pipelines.stages.evaluation_task import EVALUATION_FORMAT, EvaluationTask, bank_address, further_addresses
from pipelines.stages.photographs import instance_pictures, masked_pictures
from pipelines.storage.files import exists, join, read_json, write_json
from pipelines.tasks import (
    BankAddress,
    Call,
    MaskedPicture,
    Measured,
    SampleRequest,
    Samplers,
    Source,
    picture_name,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dreambooth.evaluation.bank import ImageEmbeddings


def check_protocol(config: DreamBoothConfig) -> None:
    """Raise InputError for prompts or encoders unusable for evaluation, at the end or during training."""
    measured = protocol_of(config, dtype="", sampler="") is not None
    if measured or config.evaluation.every is not None:
        bank_address(config.evaluation, config.base_model)
    for name in FURTHER:
        if getattr(config.evaluation, name) is not None and not measured:
            raise InputError(
                f"evaluation.{name} measures the samples of evaluation.protocol, which is 'none'; set that, such as to "
                f"auto, or leave evaluation.{name} out"
            )
    further_addresses(config.evaluation)


def compared_images(config: DreamBoothConfig, trained: Inspection, inspect: Inspect = inspect_addresses) -> Inspection:
    """The real images that samples are compared with: those trained on, unless others are set.

    Its warnings are about the others only. Raises InputError for faults of theirs.
    """
    if config.evaluation.real_images is None:
        return replace(trained, warnings=())
    real = inspect(config.evaluation.real_images, resolution=1, max_pixels=config.images.max_pixels, trained=False)
    return replace(real, warnings=tuple(f"evaluation.real_images: {warning}" for warning in real.warnings))


def find_evaluation(task: EvaluationTask) -> dict[str, Any] | None:
    """Existing figures of a task, or None."""
    if not exists(task.uri):
        return None
    found: dict[str, Any] = read_json(task.uri)
    return found


def run_protocol(
    task: EvaluationTask,
    samplers: Samplers,
    *,
    base: Source,
    fine_tuned: Source,
    real: Sequence[bytes] | None = None,
    on_progress: Callable[[int, int], None] = lambda made, total: None,
) -> dict[str, Any]:
    """Measure one model, and write its figures; `on_progress(made, total)` counts pictures.

    `real` are the task's images by `instance_pictures`, where they have been read already.
    """
    if (found := find_evaluation(task)) is not None:
        return found
    instance = instance_pictures(task.config, task.images, task.config.picture_side) if real is None else real
    texts = [*task.protocol.texts, *task.protocol.texts_without_identifier]
    bank_alone = replace(task.bank, further=())  # all that texts, the base model's and masked pictures are for
    of_real = [
        Call(method="seen", arguments=(instance, task.bank)),
        Call(method="texts", arguments=(texts, bank_alone)),
    ]
    masked = masked_pictures(task.config, task.images, task.config.picture_side)
    # The base model's first: a sampler switches pipelines once.
    of_base = [_call(base, pictures, base_samples_uri(task, pictures), bank_alone) for pictures in task.base_sets]
    of_fine_tuned = [
        _call(fine_tuned, pictures, samples_uri(task, pictures), task.bank, instance, masked)
        for pictures in task.fine_tuned_sets
    ]
    of_subject = [Call(method="seen", arguments=([each.alone for each in masked], bank_alone))] if masked else []
    results = _results(samplers, [*of_real, *of_base, *of_fine_tuned, *of_subject], on_progress)
    seen_subject = results.pop() if of_subject else None
    seen, embedded_texts, *measured = results
    evaluation = _evaluation(task, measured, seen, embedded_texts, seen_subject)
    samples = [pictures.embeddings.dino for pictures in measured[len(task.base_sets) : -1]]
    store_embeddings(task.uri, samples=samples, photographs=seen.embeddings.dino)
    write_json(task.uri, evaluation)
    return evaluation


def samples_uri(task: EvaluationTask, pictures: SampleSet) -> str:
    """Address of the fine-tuned model's pictures."""
    return join(task.config.run_uri, "evaluations", "samples", pictures.key)


def base_samples_uri(task: EvaluationTask, pictures: SampleSet) -> str:
    """Address of the base model's pictures."""
    return join(task.config.prior_uri, "base-samples", pictures.key)


def _results(samplers: Samplers, calls: Sequence[Call], on_progress: Callable[[int, int], None]) -> list[Any]:
    """Results of the calls, in order; only samples count as progress."""
    sizes = [len(call.arguments[1].seeds) if call.method == "measured" else 0 for call in calls]
    made = 0
    on_progress(made, sum(sizes))
    results: dict[int, Any] = {}
    for place, result in samplers.run(calls):
        results[place] = result
        made += sizes[place]
        on_progress(made, sum(sizes))
    return [results[place] for place in range(len(calls))]


def _call(
    source: Source,
    pictures: SampleSet,
    uri: str,
    bank: BankAddress,
    instance: Sequence[bytes] = (),
    masked: Sequence[MaskedPicture] = (),
) -> Call:
    return Call(method="measured", arguments=(source, _request(pictures), uri, bank, instance, masked))


def _request(pictures: SampleSet) -> SampleRequest:
    return SampleRequest(
        prompts=pictures.prompts,
        seeds=pictures.seeds,
        num_inference_steps=pictures.num_inference_steps,
        guidance_scale=pictures.guidance_scale,
        resolution=pictures.resolution,
        dtype=pictures.dtype,
    )


def _evaluation(
    task: EvaluationTask, measured: Sequence[Measured], real: Measured, texts: "Tensor", subject: Measured | None
) -> dict[str, Any]:
    """Content of evaluation.json: the figures, their inputs, and the addresses of the pictures."""
    from dreambooth.evaluation.figures import BankId
    from dreambooth.evaluation.measure import PromptSamples, measure

    protocol, sets = task.protocol, len(task.base_sets)
    base = _by_prompt(task, task.base_sets, measured[:sets], base_samples_uri)
    fine_tuned = _by_prompt(task, task.fine_tuned_sets[:-1], measured[sets:-1], samples_uri)
    of_class, class_pictures = measured[-1], task.fine_tuned_sets[-1]
    prompts = [
        PromptSamples(
            prompt=protocol.texts[place],
            application=prompt.application,
            samples=fine_tuned[place].embeddings,
            text=texts[place],
            text_no_identifier=texts[len(protocol.texts) + place],
            base=base[place].embeddings,
            distances=fine_tuned[place].distances if protocol.images_per_prompt > 1 else None,
            to_instance=fine_tuned[place].to_real,
            to_subject=fine_tuned[place].to_subject,
        )
        for place, prompt in enumerate(protocol.prompts.prompts)
    ]
    bank = BankId(name=task.bank.name, hash=task.bank.hash)
    figures = measure(
        bank=bank,
        prompts=prompts,
        instance=real.embeddings,
        class_samples=of_class.embeddings,
        instance_distances=real.distances,
        subject=None if subject is None else subject.embeddings,
        further={each.name: BankId(name=each.name, hash=each.hash) for each in task.bank.further},
    )
    return figures.as_dict() | {
        "format": EVALUATION_FORMAT,
        "key": task.key,
        "subject": task.config.subject.name,
        "class_noun": protocol.class_noun,
        "identifier": protocol.identifier,
        "model_key": task.model_key,
        "prompt_list": protocol.prompts.name,
        "prompts_key": protocol.prompts_key,
        "images_per_prompt": protocol.images_per_prompt,
        "instance_images": [image.address for image in task.images],
        "samples": join(task.config.run_uri, "evaluations", "samples"),
        "pictures": [
            {
                "prompt": tuned.prompt,
                "base_prompt": before.prompt,
                "fine_tuned": tuned.addresses,
                "base": before.addresses,
            }
            for tuned, before in zip(fine_tuned, base, strict=True)
        ],
        "class_prompt": protocol.class_prompt,
        "class_pictures": _addresses(samples_uri(task, class_pictures), class_pictures),
    }


@dataclass(frozen=True, kw_only=True)
class _OfPrompt:
    """The N pictures of one prompt: addresses, embeddings, and distances to M real ones."""

    prompt: str
    addresses: list[str]
    embeddings: "ImageEmbeddings"
    distances: "Tensor"  # (N, N)
    to_real: "Tensor"  # (N, M)
    to_subject: "Mapping[str, Tensor]"


def _by_prompt(
    task: EvaluationTask,
    sets: Sequence[SampleSet],
    measured: Sequence[Measured],
    uri: Callable[[EvaluationTask, SampleSet], str],
) -> list[_OfPrompt]:
    """Split pictures sampled together by prompt; `uri(task, pictures)` is a set's address."""
    images = task.protocol.images_per_prompt
    return [
        _OfPrompt(
            prompt=pictures.prompts[first],
            addresses=_addresses(uri(task, pictures), pictures)[first : first + images],
            embeddings=seen.embeddings[first : first + images],
            distances=seen.distances[first : first + images, first : first + images],
            to_real=seen.distances[first : first + images, len(pictures.seeds) :],
            to_subject={name: similar[first : first + images] for name, similar in seen.to_subject.items()},
        )
        for pictures, seen in zip(sets, measured, strict=True)
        for first in range(0, len(pictures.seeds), images)
    ]


def _addresses(uri: str, pictures: SampleSet) -> list[str]:
    return [join(uri, picture_name(place)) for place in range(len(pictures.seeds))]
