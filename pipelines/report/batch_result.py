"""The data of a batch's page."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.report.evaluated import Evaluated
from pipelines.report.retrieval import Embedded, RetrievedByBank
from pipelines.tasks import SubjectRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubjectResult:
    """One subject's row: its record and its results so far.

    `uri` is the folder of its run, `page` the link to its page, `sample` the address of one sample, `history` holds one
    mapping of metrics a step (step, loss, instance_loss, prior_loss, …), `scores` one a measurement (step, dino,
    clip_t), `contact_sheet` a PNG; paces are of this command's steps, the second one of a second stage, and 0 where all
    steps had been made before; `step_seconds` is the time of training, with what is done between steps. `verdict` has
    the shares of the samples for the eye, as stored; `figures` are the protocol's means by bank and figure
    (miniature_dino).
    """

    record: SubjectRecord
    uri: str | None = None
    page: str | None = None
    sample: str | None = None
    registered: str | None = None
    model_uri: str | None = None
    similarity: Mapping[str, float] | None = None
    verdict: Mapping[str, Any] | None = None
    warnings: Sequence[str] = ()
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    steps_per_second: float | None = None
    second_steps_per_second: float | None = None
    step_seconds: float | None = None
    history: Sequence[Mapping[str, float]] = ()
    scores: Sequence[Mapping[str, float]] = ()
    contact_sheet: bytes | None = None
    evaluated: Evaluated | None = None
    embedded: Embedded | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchResult:
    """A batch: `lede` is a line about it, `facts` are (what, value) rows, `commands` (what, command line)."""

    name: str
    facts: Sequence[tuple[str, str]]
    subjects: Sequence[SubjectResult]
    lede: str = ""
    commands: Sequence[tuple[str, str]] = ()
    retrieved: Sequence[RetrievedByBank] = ()
