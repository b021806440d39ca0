"""The measurement of one model: its pictures, what they are compared with, and its key.

A model has two at most: of samples for the eye (`samples_task`), and of the protocol's prompts (`protocol_task`). They
differ in prompts and encoders.
"""

import functools
import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

from dreambooth.config.evaluation import FURTHER, EvaluationConfig
from dreambooth.config.settings import DreamBoothConfig, config_hash
from dreambooth.data.images import InstanceImage
from dreambooth.data.inspection import Inspection
from dreambooth.errors import InputError
from dreambooth.evaluation.bank import ENCODER
from dreambooth.evaluation.protocol import FOR_THE_EYE, Protocol, SampleSet, protocol_of, samples_of
from dreambooth.miniature import BASES
from pipelines.storage.files import join
from pipelines.tasks import BankAddress, EncoderAddress, TrainTask

EVALUATION_FORMAT = 1
DEFAULT_ENCODER = "facebook/dino-vits16"
_MINIATURE = BankAddress(name="miniature", hash=None, dino="", clip="", lpips=None)
"""It comes with the package, so samples and protocol name the same one, and a sampler loads it once."""


class Measured(TypedDict):
    """Which weights a model's pictures come from, and what computes them."""

    model_key: str
    base_hash: str
    dtype: str
    sampler: str


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """One model to be measured against `images`, whose hash is `data_hash`.

    `model_key` names the model's weights, `base_hash` those of all stages of the base model. Without a `bank` pictures
    are made, and nothing is measured.
    """

    config: DreamBoothConfig
    protocol: Protocol
    bank: BankAddress | None
    images: tuple[InstanceImage, ...]
    data_hash: str
    model_key: str
    base_hash: str

    @property
    def fine_tuned_sets(self) -> tuple[SampleSet, ...]:
        """The fine-tuned model's pictures, those of the class prompt last."""
        return (*self.protocol.fine_tuned(self.model_key), self.protocol.of_class(self.model_key))

    @property
    def base_sets(self) -> tuple[SampleSet, ...]:
        """The base model's pictures, those of the class prompt last."""
        return (*self.protocol.base(self.base_hash), self.protocol.of_class(self.base_hash))

    @property
    def for_the_eye(self) -> bool:
        """Whether its pictures are the samples of a run's contact sheet."""
        return self.protocol.prompts.name == FOR_THE_EYE

    @property
    def key(self) -> str:
        """The evaluation's key: 20 hex digits over the pictures, the subject's images, and the encoders.

        Of samples for the eye without encoders, which a driver doesn't load.
        """
        sets = [pictures.key for pictures in (*self.fine_tuned_sets, *self.base_sets)]
        parts: list[Any] = [EVALUATION_FORMAT, sets, self.data_hash]
        if self.for_the_eye or self.bank is None:
            parts.append(self.protocol.prompts.name)
        else:
            parts += [self.bank.hash, *(encoder.hash for encoder in self.bank.further)]
        if self.config.images.masked:
            parts.append("subject patches")  # which earlier evaluations lack
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]

    @property
    def uri(self) -> str:
        """Address of the figures."""
        return join(self.config.run_uri, "evaluations", self.key, "evaluation.json")


def protocol_task(
    config: DreamBoothConfig,
    compared: Inspection,
    *,
    bank: BankAddress | None = None,
    **measured: Unpack[Measured],
) -> EvaluationTask | None:
    """The measurement of a run's model, from pictures computed in `dtype` by `sampler`; None without a protocol.

    `compared` are the real images, by `compared_images`; `bank` None is the configured one.
    """
    protocol = protocol_of(config, dtype=measured["dtype"], sampler=measured["sampler"])
    if protocol is None:
        return None
    if bank is None:
        further = further_addresses(config.evaluation)
        bank = replace(bank_address(config.evaluation, config.base_model), further=further)
    return EvaluationTask(
        config=config,
        protocol=protocol,
        bank=bank,
        images=compared.images,
        data_hash=compared.data_hash,
        model_key=measured["model_key"],
        base_hash=measured["base_hash"],
    )


def samples_task(
    config: DreamBoothConfig,
    images: tuple[InstanceImage, ...],
    data_hash: str,
    *,
    bank: BankAddress | None = None,
    **measured: Unpack[Measured],
) -> EvaluationTask | None:
    """The samples for the eye of a run's model, compared with the images that it was trained on; None without them.

    `data_hash` is that of the images, `bank` is by `encoder_address`, which isn't part of the key.
    """
    protocol = samples_of(config, dtype=measured["dtype"], sampler=measured["sampler"])
    if protocol is None:
        return None
    return EvaluationTask(
        config=config,
        protocol=protocol,
        bank=bank,
        images=images,
        data_hash=data_hash,
        model_key=measured["model_key"],
        base_hash=measured["base_hash"],
    )


def tasks_of_subject(task: TrainTask, encoder: BankAddress | None = None) -> tuple[EvaluationTask, ...]:
    """The measurements of the model that a task trains; `encoder` measures the samples for the eye."""
    if (own := task.measurement) is None:
        return ()
    trained = Inspection(images=task.images, data_hash=task.data_hash, warnings=())
    measured: Measured = {
        "model_key": task.key,
        "base_hash": pictures_hash(*(stage.base_hash for stage in task.stages)),
        "dtype": task.sampling_dtype,
        "sampler": own.sampler,
    }
    found = [samples_task(task.config, task.images, task.data_hash, bank=encoder, **measured)]
    if own.bank is not None:
        found.append(protocol_task(task.config, own.compared or trained, bank=own.bank, **measured))
    return tuple(each for each in found if each is not None)


def meant_encoder(config: DreamBoothConfig) -> str:
    """The address of a configuration's image encoder, available or not."""
    return config.evaluation.image_encoder or ("miniature" if config.base_model in BASES else DEFAULT_ENCODER)


def encoder_address(config: DreamBoothConfig) -> BankAddress:
    """What measures the samples for the eye: a ViT, or the miniature's bank. Raises InputError if unavailable."""
    from dreambooth.evaluation.encoder_files import find_image_encoder

    chosen = meant_encoder(config)
    try:
        find_image_encoder(chosen)
    except InputError as error:
        raise InputError(f"evaluation.image_encoder: {error}") from None
    return encoder_at(chosen)


def encoder_at(address: str) -> BankAddress:
    """The bank of a ViT at an address; `miniature` is the miniature's, with its CLIP."""
    if address == "miniature":
        return _MINIATURE
    return BankAddress(name=ENCODER, hash=None, dino=address, clip="", lpips=None)


def pictures_hash(base_hash: str, second_hash: str | None = None) -> str:
    """Hash of what the base model's pictures come from: its own, or that of both stages of a cascade."""
    return base_hash if second_hash is None else config_hash(base_hash, second_hash)


def bank_address(settings: EvaluationConfig, base_model: str) -> BankAddress:
    """The configured bank. Raises InputError, with what to fetch, if unavailable."""
    from dreambooth.evaluation.banks import default_bank

    name = default_bank(base_model) if settings.bank == "auto" else settings.bank
    where = _MINIATURE
    if name != "miniature":
        where = BankAddress(name=name, hash=None, dino=settings.dino, clip=settings.clip, lpips=settings.lpips)
    return replace(where, hash=_bank_hash(where))


def further_addresses(settings: EvaluationConfig) -> tuple[EncoderAddress, ...]:
    """The configured encoders beside the bank's. Raises InputError, with what to fetch, for an unavailable one."""
    given = [(name, getattr(settings, name)) for name in FURTHER]
    return tuple(_encoder_address(name, address) for name, address in given if address is not None)


@functools.cache
def _encoder_address(name: str, address: str) -> EncoderAddress:
    from dreambooth.evaluation.further import load_further

    return EncoderAddress(name=name, address=address, hash=load_further(name, address).hash)


@functools.cache
def _bank_hash(where: BankAddress) -> str:
    from dreambooth.evaluation.bank import BankLocations
    from dreambooth.evaluation.banks import load_bank

    return load_bank(where.name, locations=BankLocations(dino=where.dino, clip=where.clip, lpips=where.lpips)).hash
