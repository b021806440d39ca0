"""What the tables of `dreambooth paper` are made of: rows of settings, claims about them, and the size of the whole."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

COLUMN_TITLES = {
    "dino": "DINO ↑",
    "clip_i": "CLIP-I ↑",
    "clip_t_no_identifier": "CLIP-T ↑",
    "pres": "PRES ↓",
    "div": "DIV ↑",
    "near_copies": "near-copies ↓",
}
"""Columns of a table. CLIP-T uses the prompt without the identifier, the same text for every row of a table."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table: a base model, and settings that differ from its own, dotted as for --set.

    `reads` names other figures of an evaluation for some columns, None for a column without one.
    """

    slug: str
    title: str
    base_model: str = "miniature"
    settings: Mapping[str, Any] = field(default_factory=dict)
    class_noun: Literal["correct", "wrong"] = "correct"
    instance_images: int = 5
    reads: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of the paper's own table: figures by column, None where missing."""

    title: str
    figures: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An expected result: row `higher` is above row `lower` (slugs) in a column."""

    sentence: str
    column: str
    higher: str
    lower: str


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table; with `every_subject` False only of the setting's few side subjects."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    every_subject: bool = True
    note: str = ""
    published: tuple[Published, ...] = ()
    published_columns: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Size of the whole: experiments, shipped subjects, samples per prompt, and settings of a base model's rows.

    Only `tables` are made, by name, or all if there are none.
    """

    name: str
    experiments: tuple[Experiment, ...]
    subjects: tuple[str, ...]
    few_subjects: tuple[str, ...]
    images_per_prompt: int = 2
    common: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tables: tuple[str, ...] = ()

    def subjects_of(self, experiment: Experiment) -> tuple[str, ...]:
        """The subjects of an experiment's rows."""
        return self.subjects if experiment.every_subject else self.few_subjects
