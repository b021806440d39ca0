"""The messages that travel between processes: frozen, plain data, each fact once."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from dreambooth.config.bounds import Graph
from dreambooth.config.differences import with_differences
from dreambooth.config.settings import DreamBoothConfig
from dreambooth.data.images import InstanceImage
from dreambooth.data.inspection import Inspection
from dreambooth.sampling.class_images import PriorPlan
from pipelines.storage.files import join

if TYPE_CHECKING:
    from torch import Tensor

    from dreambooth.evaluation.bank import ImageEmbeddings

Message = dict[str, Any]
"""A worker's report: `kind`, the fields of that kind, and the `stage` if it isn't the first."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A pipeline: a base model (address, revision and hash), or the prefix of a model published here.

    Pictures of a base model go through its second stage, if one is named, whose small pictures get the noise of a stage
    tuned on `noise_levels`; None: as the base has it. With `only_second` that stage is there alone, for given ones.
    """

    address: str
    revision: str | None = None
    base_hash: str | None = None
    published: bool = False
    super_resolution: "Source | None" = None
    noise_levels: int | None = None
    only_second: bool = False


def base_source(config: DreamBoothConfig, base_hash: str, second_hash: str | None = None) -> Source:
    """The pipeline of a configuration's base model, which has this hash; with its second stage if that's given."""
    own, second = config.super_resolution, None
    if second_hash is not None:
        second = Source(address=str(own.base_model), revision=own.revision, base_hash=second_hash)
    return Source(address=config.base_model, revision=config.revision, base_hash=base_hash, super_resolution=second)


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Requested pictures: one per (prompt, seed), computed in `dtype` on any device."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    num_inference_steps: int
    guidance_scale: float
    resolution: int
    dtype: str


def picture_name(place: int) -> str:
    """File name of a picture by its index in the set."""
    return f"{place}.png"


@dataclass(frozen=True, kw_only=True)
class EncoderAddress:
    """An encoder beside a bank's: its name, its location, and its hash on the driver."""

    name: str
    address: str
    hash: str


@dataclass(frozen=True, kw_only=True)
class BankAddress:
    """A bank of encoders, its hash on the driver, the locations of the paper's, and the encoders beside it.

    `hash` None: whatever is found where the pictures are made; `dino` is the encoder of a bank of one.
    """

    name: str
    hash: str | None
    dino: str
    clip: str
    lpips: str | None
    further: tuple[EncoderAddress, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MaskedPicture:
    """A photograph's square and its mask's, as PNG; `alone` is the subject on white, in a square around it."""

    picture: bytes
    mask: bytes
    alone: bytes


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A bank's view of N pictures: embeddings, and distances to themselves and M real ones, (N, N + M).

    M is 0 without real ones. `to_subject` are masked patch similarities (N, masked photographs), by encoder; `bank` is
    the hash of the bank.
    """

    bank: str
    embeddings: "ImageEmbeddings"
    distances: "Tensor"
    to_subject: "Mapping[str, Tensor]" = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of an `ImageSampler` method."""

    method: str
    arguments: tuple[Any, ...]


class Samplers(typing.Protocol):
    """Runs calls: on actors of the cluster, or in this process."""

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Results of the calls as they arrive, each with its index."""


@dataclass(frozen=True, kw_only=True)
class PriorSet:
    """A whole set of class images."""

    key: str
    uri: str
    class_prompt: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A subject's measurement, as far as its `TrainTask` and the lane don't say.

    `sampler` is the base's `Family.sampler_name`; `bank` is that of the protocol's figures, None without a protocol;
    `compared` is None where the protocol's samples are compared with the images of the training.
    """

    sampler: str
    bank: BankAddress | None = None
    compared: Inspection | None = None


@dataclass(frozen=True, kw_only=True)
class SecondStage:
    """The task of a cascade's second stage, as far as the first's doesn't say.

    `settings` are its `differences` from `DreamBoothConfig.second_stage`.
    """

    settings: Mapping[str, Any]
    engine: str
    key: str
    base_hash: str
    checkpoint_bytes: int
    gpu_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """A worker's task, as plain data. `sampling_dtype` is the plan's dtype of samples.

    `gpu_bytes` are those that training takes of a GPU on which a pipeline stays loaded, as planned; 0 without GPUs.
    The `second` stage is trained after this one; the model of both is published under this task's key.
    """

    config: DreamBoothConfig
    images: tuple[InstanceImage, ...]
    prior_set: PriorSet | None
    measurement: Measurement | None = None
    engine: str
    key: str
    data_hash: str
    base_hash: str
    checkpoint_bytes: int
    sampling_dtype: str
    gpu_bytes: int = 0
    second: SecondStage | None = None

    @property
    def stages(self) -> "tuple[TrainTask, ...]":
        """This task, and that of a second stage if there is one."""
        return (self,) if self._second_task is None else (self, self._second_task)

    @cached_property
    def _second_task(self) -> "TrainTask | None":
        """A second stage's task, whose settings take a while to make."""
        if (own := self.second) is None or (config := self.config.second_stage) is None:
            return None
        return dataclasses.replace(
            self,
            config=with_differences(config, own.settings),
            prior_set=None,
            measurement=None,
            second=None,
            engine=own.engine,
            key=own.key,
            base_hash=own.base_hash,
            checkpoint_bytes=own.checkpoint_bytes,
            gpu_bytes=own.gpu_bytes,
        )

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what was computed from them doesn't travel."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def reads_slices(self) -> bool:
        """Whether each worker reads its part of the trained weights alone, as ZeRO-3 leaves no more to it."""
        return self.engine == "deepspeed" and self.config.zero.stage == 3

    @property
    def base(self) -> Source:
        """The base model's pipeline, all stages of it."""
        return base_source(self.config, self.base_hash, None if self.second is None else self.second.base_hash)

    @property
    def tuned_base(self) -> Source:
        """`base` with the noise that the trained second stage is sampled with: the pipeline for trained weights."""
        levels = self.config.super_resolution.noise_levels
        return self.base if self.second is None else dataclasses.replace(self.base, noise_levels=levels)


@dataclass(frozen=True, kw_only=True)
class MakeClassImages:
    """Make these blocks of a set, dealt to the workers in turn; `wanted` holds the missing images of each.

    Without blocks, all images exist and only the manifest is missing.
    """

    plan: PriorPlan
    source: Source
    parent_uri: str
    blocks: tuple[range, ...] = ()
    wanted: tuple[tuple[int, ...], ...] = ()

    @property
    def uri(self) -> str:
        """Address of the set."""
        return join(self.parent_uri, self.plan.key)


@dataclass(frozen=True, kw_only=True)
class TrainSubject:
    """Train one subject."""

    task: TrainTask


@dataclass(frozen=True, kw_only=True)
class Wait:
    """No work now; ask again later."""

    seconds: float = 1.0


Work = TrainSubject | MakeClassImages | Wait


@dataclass(frozen=True, kw_only=True)
class LaneTask:
    """A lane's task: its name, the queue's handle, threads per worker, the encoder of samples for the eye, if any, the
    seconds between progress reports of a subject, `cluster.graph_sampling`, and how many lanes share a GPU."""

    lane: str
    queue: Any
    num_threads: int
    encoder: BankAddress | None
    report_seconds: float
    graph: Graph
    lanes_per_gpu: int


State = Literal["waiting", "training", "trained", "done", "failed"]
"""waiting for class images or a lane; in a lane; published but not registered; registered; set aside."""

STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True, kw_only=True)
class SubjectRecord:
    """One subject: its plan's `key`, and the numbers of `attempts` and `failures`.

    `reason` and `traceback` are the last failure's; `began` and `ended` are seconds since the epoch.
    """

    name: str
    key: str
    class_noun: str
    identifier: str
    state: State = "waiting"
    lane: str | None = None
    attempts: int = 0
    failures: int = 0
    reason: str | None = None
    traceback: str | None = None
    began: float | None = None
    ended: float | None = None

    def changed(self, **changes: Any) -> Self:
        """The record with some fields changed."""
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """The message as plain data, for JSON."""
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`."""
        return cls(**plain)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a subject in a lane.

    `pictures` are the evaluation's (made, to make); None while it trains.
    """

    step: int
    steps: int
    images_per_second: float
    loss: float
    pictures: tuple[int, int] | None = None
