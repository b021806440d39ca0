"""Subjects for a queue, and what lanes do with them."""

import itertools
from typing import Any

from dreambooth.config.settings import load_config
from dreambooth.sampling.class_images import PriorPlan, image_name
from pipelines.queue.subject_queue import QueuedSubject, SubjectQueue
from pipelines.storage.files import join, write_bytes
from pipelines.tasks import MakeClassImages, SubjectRecord, TrainSubject, TrainTask

LANE, OTHER = "driver/0", "driver/1"


def prior(class_noun: str, count: int = 4) -> PriorPlan:
    return PriorPlan(
        base_hash="0" * 16,
        class_prompt=f"a photo of a {class_noun}",
        resolution=64,
        num_inference_steps=2,
        guidance_scale=4.0,
        batch_size=2,
        seed=0,
        dtype="float32",
        sampler="dpm-solver++",
        count=count,
    )


def queued(name: str, class_noun: str | None = None, *, key: str = "k", count: int = 4) -> QueuedSubject:
    config = load_config(
        {
            "subject": {"name": name, "class_noun": "dog", "identifier": "tfz", "instance_images": "x"},
            "storage": {"root": "memory://batch"},
        }
    )
    task = TrainTask(
        config=config,
        images=(),
        prior_set=None,
        engine="torch",
        key=key,
        data_hash="",
        base_hash="0" * 16,
        checkpoint_bytes=0,
        sampling_dtype="float32",
    )
    record = SubjectRecord(name=name, key=key, class_noun="dog", identifier="tfz")
    return QueuedSubject(record=record, task=task, prior=None if class_noun is None else prior(class_noun, count))


def name_of(work: Any) -> str:
    assert isinstance(work, TrainSubject), work
    return work.task.config.subject.name


def finish(queue: SubjectQueue, name: str) -> None:
    queue.trained(name)
    queue.done(name)


def write(work: MakeClassImages) -> set[int]:
    indices = set(itertools.chain(*work.wanted))
    for index in indices:
        write_bytes(join(work.uri, image_name(index)), b"png")
    return indices
