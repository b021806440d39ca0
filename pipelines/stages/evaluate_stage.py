"""Evaluate one model: sample, embed, measure, and write evaluation.json beside the model.

DINO's embeddings are stored with it, for what compares subjects with each other.

Samplers embed their own pictures, so pictures travel only to storage, under keys of all that decides their pixels
(`dreambooth.evaluation.protocol`): the fine-tuned model's in its run, the base model's beside the class images, for
all subjects of the class. An unfinished evaluation samples missing pictures; a finished one is found by its key.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dreambooth.config.evaluation import FURTHER
from dreambooth.config.settings import DreamBoothConfig
from dreambooth.data.inspection import Inspect, Inspection, inspect_addresses
from dreambooth.errors import InputError
from dreambooth.evaluation.protocol import SampleSet, protocol_of
from pipelines.stages.embeddings import store_embeddings
from pipelines.stages.evaluation_task import EVALUATION_FORMAT, EvaluationTask, bank_address, further_addresses
from pipelines.stages.photographs import Photographs, read_photographs
from pipelines.storage.files import exists, join, read_json, write_bytes, write_json
from pipelines.storage.pictures import read_pictures
from pipelines.tasks import (
    BankAddress,
    Call,
    Measured,
    SampleRequest,
    Samplers,
    Source,
    picture_name,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dreambooth.evaluation.bank import ImageEmbeddings
    from dreambooth.evaluation.figures import Figures


_NO_PHOTOGRAPHS = Photographs(squares=())


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


def evaluate(
    task: EvaluationTask,
    samplers: Samplers,
    *,
    base: Source,
    fine_tuned: Source,
    photographs: Photographs | None = None,
    on_progress: Callable[[int, int], None] = lambda made, total: None,
) -> dict[str, Any]:
    """Measure one model, and write its figures; `on_progress(made, total)` counts pictures.

    `photographs` are the task's images, where they have been read already.
    """
    if (found := find_evaluation(task)) is not None:
        return found
    photographs = photographs or read_photographs(task.config, task.images, task.config.picture_side)
    stored = _store_photographs(task, photographs)
    bank = task.bank
    bank_alone = None if bank is None else replace(bank, further=())  # all that the base model's pictures are for
    # The base model's first: a sampler switches pipelines once.
    of_base = [_call(base, pictures, base_samples_uri(task, pictures), bank_alone) for pictures in task.base_sets]
    of_fine_tuned = [
        _call(fine_tuned, pictures, samples_uri(task, pictures), bank, photographs) for pictures in task.fine_tuned_sets
    ]
    measured = _results(samplers, [*of_base, *of_fine_tuned], on_progress)
    evaluation = _record(task, stored)
    if bank is not None and bank_alone is not None:
        seen = _seen(task, samplers, bank, photographs)
        figures = _figures(task, bank, measured, seen)
        evaluation = figures.as_dict() | evaluation
        samples = [pictures.embeddings.dino for pictures in measured[len(task.base_sets) : -1]]
        store_embeddings(task.uri, samples=samples, photographs=seen.real.embeddings.dino)
    write_json(task.uri, evaluation)
    return evaluation


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What the pictures are compared with, as a bank sees it; `samples` is None where texts were read."""

    real: Measured
    subject: Measured | None
    texts: "Tensor | None"
    samples: Measured | None


def _seen(task: EvaluationTask, samplers: Samplers, bank: BankAddress, photographs: Photographs) -> _Seen:
    """Measure the real images and the texts; without texts all samples, which have to be told apart by themselves."""
    alone = replace(bank, further=())
    texts = [*task.protocol.texts, *task.protocol.texts_without_identifier]
    calls = [
        Call(method="seen", arguments=(photographs.squares, bank)),
        Call(method="texts_if_read" if task.for_the_eye else "texts", arguments=(texts, alone)),
    ]
    if photographs.masked:
        calls.append(Call(method="seen", arguments=([each.alone for each in photographs.masked], alone)))
    real, embedded, *subject = _results(samplers, calls)
    samples = None
    if embedded is None:
        of_prompts = task.fine_tuned_sets[:-1]
        addresses = [address for one in of_prompts for address in _addresses(samples_uri(task, one), one)]
        stored = read_pictures(addresses)
        pictures = [stored[address] for address in addresses]
        [samples] = _results(samplers, [Call(method="seen", arguments=(pictures, alone))])
    return _Seen(real=real, subject=subject[0] if subject else None, texts=embedded, samples=samples)


def photographs_uri(task: EvaluationTask) -> str:
    """Address of a model's photographs as squares."""
    return join(task.config.run_uri, "evaluations", "photographs", f"{task.data_hash}-{task.config.picture_side}")


def _store_photographs(task: EvaluationTask, photographs: Photographs) -> list[str]:
    """Write the photographs beside the samples, for pages: the originals may change or go. Returns their addresses."""
    addresses = [join(photographs_uri(task), picture_name(place)) for place in range(len(photographs.squares))]
    for address, picture in zip(addresses, photographs.squares, strict=True):
        if not exists(address):
            write_bytes(address, picture)
    return addresses


def samples_uri(task: EvaluationTask, pictures: SampleSet) -> str:
    """Address of the fine-tuned model's pictures."""
    return join(task.config.run_uri, "evaluations", "samples", pictures.key)


def base_samples_uri(task: EvaluationTask, pictures: SampleSet) -> str:
    """Address of the base model's pictures."""
    return join(task.config.prior_uri, "base-samples", pictures.key)


def _results(
    samplers: Samplers,
    calls: Sequence[Call],
    on_progress: Callable[[int, int], None] = lambda made, total: None,
) -> list[Any]:
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
    bank: BankAddress | None,
    photographs: Photographs = _NO_PHOTOGRAPHS,
) -> Call:
    real = photographs.squares, photographs.masked
    return Call(method="measured", arguments=(source, _request(pictures), uri, bank, *real))


def _request(pictures: SampleSet) -> SampleRequest:
    return SampleRequest(
        prompts=pictures.prompts,
        seeds=pictures.seeds,
        num_inference_steps=pictures.num_inference_steps,
        guidance_scale=pictures.guidance_scale,
        resolution=pictures.resolution,
        dtype=pictures.dtype,
    )


def _figures(task: EvaluationTask, bank: BankAddress, measured: Sequence[Measured], seen: _Seen) -> "Figures":
    from dreambooth.evaluation.figures import BankId
    from dreambooth.evaluation.measure import PromptSamples, measure

    protocol, sets = task.protocol, len(task.base_sets)
    base, base_class = _by_prompt(task, task.base_sets[:-1], measured[: sets - 1]), measured[sets - 1]
    fine_tuned, of_class = _by_prompt(task, task.fine_tuned_sets[:-1], measured[sets:-1]), measured[-1]
    texts = seen.texts
    prompts = [
        PromptSamples(
            prompt=protocol.texts[place],
            application=prompt.application,
            samples=fine_tuned[place].embeddings,
            text=None if texts is None else texts[place],
            text_no_identifier=None if texts is None else texts[len(protocol.texts) + place],
            base=base[place].embeddings,
            distances=fine_tuned[place].distances if protocol.images_per_prompt > 1 else None,
            to_instance=fine_tuned[place].to_real,
            to_subject=fine_tuned[place].to_subject,
        )
        for place, prompt in enumerate(protocol.prompts.prompts)
    ]
    return measure(
        bank=BankId(name=bank.name, hash=seen.real.bank),
        prompts=prompts,
        instance=seen.real.embeddings,
        class_samples=of_class.embeddings,
        base_class_samples=base_class.embeddings,
        instance_distances=seen.real.distances,
        sample_distances=None if seen.samples is None else seen.samples.distances,
        subject=None if seen.subject is None else seen.subject.embeddings,
        further={each.name: BankId(name=each.name, hash=each.hash) for each in bank.further},
    )


def _record(task: EvaluationTask, photographs: Sequence[str]) -> dict[str, Any]:
    """Content of evaluation.json beside the figures: what they were measured of, and the addresses of the pictures."""
    protocol = task.protocol
    *fine_tuned, tuned_class = task.fine_tuned_sets
    *base, base_class = task.base_sets
    return {
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
        "photographs": list(photographs),
        "samples": join(task.config.run_uri, "evaluations", "samples"),
        "pictures": [
            {"prompt": prompt, "base_prompt": without, "fine_tuned": tuned, "base": before}
            for prompt, without, tuned, before in zip(
                protocol.texts,
                protocol.texts_without_identifier,
                _addresses_by_prompt(task, fine_tuned, samples_uri),
                _addresses_by_prompt(task, base, base_samples_uri),
                strict=True,
            )
        ],
        "class_prompt": protocol.class_prompt,
        "class_pictures": _addresses(samples_uri(task, tuned_class), tuned_class),
        "base_class_pictures": _addresses(base_samples_uri(task, base_class), base_class),
    }


@dataclass(frozen=True, kw_only=True)
class _OfPrompt:
    """The N pictures of one prompt: embeddings, and distances to M real ones."""

    embeddings: "ImageEmbeddings"
    distances: "Tensor"  # (N, N)
    to_real: "Tensor"  # (N, M)
    to_subject: "Mapping[str, Tensor]"


def _by_prompt(task: EvaluationTask, sets: Sequence[SampleSet], measured: Sequence[Measured]) -> list[_OfPrompt]:
    """Split what was measured of pictures sampled together by prompt."""
    images = task.protocol.images_per_prompt
    return [
        _OfPrompt(
            embeddings=seen.embeddings[first : first + images],
            distances=seen.distances[first : first + images, first : first + images],
            to_real=seen.distances[first : first + images, len(pictures.seeds) :],
            to_subject={name: similar[first : first + images] for name, similar in seen.to_subject.items()},
        )
        for pictures, seen in zip(sets, measured, strict=True)
        for first in range(0, len(pictures.seeds), images)
    ]


def _addresses_by_prompt(
    task: EvaluationTask, sets: Iterable[SampleSet], uri: Callable[[EvaluationTask, SampleSet], str]
) -> list[list[str]]:
    """Addresses of each prompt's pictures; `uri(task, pictures)` is a set's address."""
    images = task.protocol.images_per_prompt
    return [
        _addresses(uri(task, pictures), pictures)[first : first + images]
        for pictures in sets
        for first in range(0, len(pictures.seeds), images)
    ]


def _addresses(uri: str, pictures: SampleSet) -> list[str]:
    return [join(uri, picture_name(place)) for place in range(len(pictures.seeds))]
