"""Check all subjects of a batch in parallel before anything starts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing import get_context
from typing import TYPE_CHECKING

from dreambooth.amounts import counted
from dreambooth.config.sections import Sections, with_shared_sections
from dreambooth.config.settings import DreamBoothConfig
from dreambooth.data.identifier import choose_identifiers, token_ids_in_prompts
from dreambooth.errors import InputError
from dreambooth.models.base_model import BaseModel, resolve_base_model
from dreambooth.quiet import quiet
from pipelines.cluster.ray_cluster import Resources, usable_cpus
from pipelines.plan.inspections import Found, Inspections
from pipelines.plan.run_plan import Plan, make_plan
from pipelines.plan.subject_list import ListedSubject
from pipelines.storage.files import is_local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE, _PER_PART = 16, 64
_PER_PROCESS, _MOST_PROCESSES = 500, 8
"""Fewest subjects worth another process."""

_Name = tuple[str, str | None, bool]
Bases = Mapping[_Name, BaseModel | InputError]
"""Base models, or their faults, by address, revision and whether it is a second stage."""


@dataclass(frozen=True, kw_only=True)
class SubjectCheck:
    """Checks of one subject; without a plan, `errors` has the reasons. `found` is what its inspections had."""

    name: str
    plan: Plan | None
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    found: Found = field(default_factory=dict, compare=False)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A subject to check, the identifier chosen for it, if any, and what earlier inspections found of it."""

    config: DreamBoothConfig
    identifier: str | None
    known: Found


def check_subjects(
    subjects: Sequence[ListedSubject], resources: Resources, known: Mapping[str, Found] | None = None
) -> tuple[SubjectCheck, ...]:
    """Plans for all subjects, with identifiers that no two share.

    `known` is what inspections of an earlier plan found, by subject (`plan.inspections`).
    """
    readable = [subject.config for subject in subjects if subject.config is not None and not subject.faults]
    bases, sections = _find_bases(readable), Sections()
    identifiers, known = _identifiers(readable, bases), known or {}
    names = [config.subject.name for config in readable]
    tasks = [
        _Task(config=config, identifier=identifiers.get(name), known=known.get(name, {}))
        for name, config in zip(names, readable, strict=True)
    ]
    checked = _checked(tasks, resources, bases)
    checks = (_lean(config, bases, sections, check) for config, check in zip(readable, checked, strict=True))
    return tuple(
        _note_shared_images(
            SubjectCheck(name=subject.name, plan=None, errors=subject.faults, warnings=())
            if subject.config is None or subject.faults
            else next(checks)
            for subject in subjects
        )
    )


def valid_plans(checks: Sequence[SubjectCheck], *, skip_invalid: bool) -> tuple[Plan, ...]:
    """The plans. Raises InputError if a subject has errors, or with `skip_invalid` if all have."""
    invalid = [check for check in checks if check.errors]
    plans = tuple(check.plan for check in checks if check.plan is not None)
    if invalid and not skip_invalid:
        shown = ", ".join(check.name for check in invalid[:5])
        raise InputError(
            f"{len(invalid)} of {counted(len(checks), 'subject')} can't be trained "
            f"({shown}{', …' if len(invalid) > 5 else ''}); fix them, or skip them with --skip-invalid"
        )
    if not plans:
        raise InputError(f"no subject of {len(checks)} can be trained, so there is nothing to do")
    return plans


def _find_bases(configs: Sequence[DreamBoothConfig]) -> Bases:
    """Find, check and hash every base model once; for every subject it would take minutes."""
    bases: dict[_Name, BaseModel | InputError] = {}
    for name in dict.fromkeys(name for config in configs for name in _stages(config)):
        address, revision, scales_up = name
        try:
            base = bases[name] = resolve_base_model(address, revision, scales_up=scales_up)
            _ = base.hash  # now, before many threads read all of it
        except InputError as error:
            bases[name] = error
    return bases


def _stages(config: DreamBoothConfig) -> list[_Name]:
    """Names of a configuration's base model and, of a cascade, its second stage."""
    second = config.super_resolution
    names: list[_Name] = [(config.base_model, config.revision, False)]
    return names if second.base_model is None else [*names, (second.base_model, second.revision, True)]


def _identifiers(configs: Sequence[DreamBoothConfig], bases: Bases) -> dict[str, str]:
    """Choose identifiers for all subjects of a base model together, so no two share one; by the subject's name."""
    chosen: dict[str, str] = {}
    for name, base in bases.items():
        subjects = [config.subject for config in configs if _stages(config)[0] == name]
        taken = [str(subject.identifier) for subject in subjects if subject.identifier is not None]
        names = [subject.name for subject in subjects if subject.identifier is None]
        if names and isinstance(base, BaseModel):
            chosen |= choose_identifiers(base.tokenizer, tuple(names), taken=(*taken, *chosen.values()))
    return chosen


def _checked(tasks: Sequence[_Task], resources: Resources, bases: Bases) -> Iterator[SubjectCheck]:
    """Check in several processes if that pays: decoding pictures holds Python's lock."""
    check = partial(_check_some, resources=resources, bases=bases)
    processes = min(usable_cpus(), _MOST_PROCESSES, len(tasks) // _PER_PROCESS)
    if processes < 2:
        yield from check(tasks)
        return
    parts = [tasks[start : start + _PER_PART] for start in range(0, len(tasks), _PER_PART)]
    # A fork would hold locks of threads it lacks.
    with ProcessPoolExecutor(processes, mp_context=get_context("forkserver"), initializer=quiet) as pool:
        for part in pool.map(check, parts):
            yield from part


def _lean(config: DreamBoothConfig, bases: Bases, sections: Sections, check: SubjectCheck) -> SubjectCheck:
    """A check whose plan holds the sections and the base models that others of the batch hold, too."""
    if check.plan is None:
        return check
    first, *others = [
        replace(stage, config=with_shared_sections(stage.config, sections), base=_sound(bases[name]))
        for stage, name in zip(check.plan.stages, _stages(config), strict=True)
    ]
    return replace(check, plan=replace(first, second=others[0] if others else None))


def _check_some(tasks: Sequence[_Task], *, resources: Resources, bases: Bases) -> list[SubjectCheck]:
    """Check in threads if they wait for a store; with a fast disk, threads would slow each other down."""
    check = partial(_check, resources=resources, bases=bases)
    if all(is_local(address) for task in tasks for address in task.config.subject.instance_images):
        return [check(task) for task in tasks]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(check, tasks))


def _check(task: _Task, *, resources: Resources, bases: Bases) -> SubjectCheck:
    config, inspect = task.config, Inspections(task.known)
    name = config.subject.name
    try:
        base, second, *_ = [*(_sound(bases[name]) for name in _stages(config)), None]
        plan = make_plan(config, resources, base=base, second_base=second, identifier=task.identifier, inspect=inspect)
    except InputError as error:
        return SubjectCheck(name=name, plan=None, errors=tuple(str(error).splitlines()), warnings=())
    warnings = (*plan.warnings, *_about_class_noun(plan))
    return SubjectCheck(name=name, plan=plan, errors=(), warnings=warnings, found=inspect.found)


def _sound(base: BaseModel | InputError) -> BaseModel:
    if isinstance(base, InputError):
        raise base
    return base


def _about_class_noun(plan: Plan) -> Iterator[str]:
    noun = plan.config.subject.class_noun
    if parts := _pieces(plan.base.tokenizer, noun):
        read_as = " ".join(repr(part) for part in parts)
        yield f"the base model has no word of its own for the class noun {noun!r}, and reads it as {read_as}"


@cache
def _pieces(tokenizer: "PreTrainedTokenizerBase", noun: str) -> tuple[str, ...]:
    """The tokens of a class noun's words; empty if each word is one token."""
    tokens = token_ids_in_prompts(tokenizer, noun)
    if len(tokens) <= len(noun.split()):
        return ()
    return tuple(str(tokenizer.decode([token])).strip() for token in tokens)


def _note_shared_images(checks: Iterable[SubjectCheck]) -> Iterator[SubjectCheck]:
    first: dict[str, str] = {}
    for check in checks:
        if check.plan is None:
            yield check
            continue
        other = first.setdefault(check.plan.data_hash, check.name)
        if other == check.name:
            yield check
        else:
            yield replace(check, warnings=(*check.warnings, f"its images are those of {other}"))
