"""The measurement of one model by the protocol: its pictures, what they are compared with, and its key."""

import functools
import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from dreambooth.config.evaluation import FURTHER, EvaluationConfig
from dreambooth.config.settings import DreamBoothConfig, config_hash
from dreambooth.data.images import InstanceImage
from dreambooth.data.inspection import Inspection
from dreambooth.evaluation.protocol import Protocol, SampleSet, protocol_of
from pipelines.storage.files import join
from pipelines.tasks import BankAddress, EncoderAddress, TrainTask

EVALUATION_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """One model to be measured against `images`, whose hash is `data_hash`.

    `model_key` names the model's weights, `base_hash` those of all stages of the base model.
    """

    config: DreamBoothConfig
    protocol: Protocol
    bank: BankAddress
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
        """The base model's pictures."""
        return self.protocol.base(self.base_hash)

    @property
    def key(self) -> str:
        """The evaluation's key: 20 hex digits over the pictures, the subject's images, and the encoders."""
        sets = [pictures.key for pictures in (*self.fine_tuned_sets, *self.base_sets)]
        parts: list[Any] = [EVALUATION_FORMAT, sets, self.data_hash, self.bank.hash]
        if self.config.images.masked:
            parts.append("subject patches")  # which earlier evaluations lack
        parts += [encoder.hash for encoder in self.bank.further]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]

    @property
    def uri(self) -> str:
        """Address of the figures."""
        return join(self.config.run_uri, "evaluations", self.key, "evaluation.json")


def protocol_task(
    config: DreamBoothConfig,
    compared: Inspection,
    *,
    model_key: str,
    base_hash: str,
    dtype: str,
    sampler: str,
    bank: BankAddress | None = None,
) -> EvaluationTask | None:
    """The measurement of a run's model, from pictures computed in `dtype` by `sampler`; None without a protocol.

    `compared` are the real images, by `compared_images`; `bank` None is the configured one.
    """
    protocol = protocol_of(config, dtype=dtype, sampler=sampler)
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
        model_key=model_key,
        base_hash=base_hash,
    )


def protocol_of_subject(task: TrainTask) -> EvaluationTask | None:
    """The measurement of the model that a task trains, if any."""
    if (own := task.measurement) is None:
        return None
    return protocol_task(
        task.config,
        own.compared or Inspection(images=task.images, data_hash=task.data_hash, warnings=()),
        model_key=task.key,
        base_hash=pictures_hash(*(stage.base_hash for stage in task.stages)),
        dtype=task.sampling_dtype,
        sampler=own.sampler,
        bank=own.bank,
    )


def pictures_hash(base_hash: str, second_hash: str | None = None) -> str:
    """Hash of what the base model's pictures come from: its own, or that of both stages of a cascade."""
    return base_hash if second_hash is None else config_hash(base_hash, second_hash)


def bank_address(settings: EvaluationConfig, base_model: str) -> BankAddress:
    """The configured bank. Raises InputError, with what to fetch, if unavailable."""
    from dreambooth.evaluation.banks import default_bank

    name = default_bank(base_model) if settings.bank == "auto" else settings.bank
    return _bank_address(name, settings.dino, settings.clip, settings.lpips)


def further_addresses(settings: EvaluationConfig) -> tuple[EncoderAddress, ...]:
    """The configured encoders beside the bank's. Raises InputError, with what to fetch, for an unavailable one."""
    given = [(name, getattr(settings, name)) for name in FURTHER]
    return tuple(_encoder_address(name, address) for name, address in given if address is not None)


@functools.cache
def _encoder_address(name: str, address: str) -> EncoderAddress:
    from dreambooth.evaluation.further import load_further

    return EncoderAddress(name=name, address=address, hash=load_further(name, address).hash)


@functools.cache
def _bank_address(name: str, dino: str, clip: str, lpips: str | None) -> BankAddress:
    from dreambooth.evaluation.bank import BankLocations
    from dreambooth.evaluation.banks import load_bank

    bank = load_bank(name, locations=BankLocations(dino=dino, clip=clip, lpips=lpips))
    return BankAddress(name=name, hash=bank.hash, dino=dino, clip=clip, lpips=lpips)
