"""All subjects of a batch are looked at, side by side, before anything starts."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
from PIL import Image

from dreambooth.base_model import resolve_base_model
from dreambooth.config import DreamBoothConfig
from dreambooth.errors import InputError
from dreambooth.families.stable_diffusion import load_tokenizer
from dreambooth.identifier import choose_identifiers, token_ids_in_prompts
from dreambooth.images import open_image
from pipelines.cluster import Resources
from pipelines.plan import Plan, make_plan
from pipelines.subject_list import ListedSubject

_AT_ONCE = 16
_NEAR_BITS = 5
"""Difference hashes of 64 bits: the same photograph saved again differs in none to a few, another one in twenty."""


@dataclass(frozen=True, kw_only=True)
class SubjectCheck:
    """What was found out about one subject; without a plan it can't be trained, and `errors` say why."""

    name: str
    plan: Plan | None
    errors: tuple[str, ...]
    warnings: tuple[str, ...]


def check_subjects(subjects: Sequence[ListedSubject], resources: Resources) -> tuple[SubjectCheck, ...]:
    """Plans for all subjects, with identifiers that no two share."""
    readable = [subject.config for subject in subjects if subject.config is not None and not subject.faults]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        checks = iter(list(pool.map(partial(_check, resources=resources), _with_identifiers(readable))))
    return tuple(
        _note_shared_images(
            SubjectCheck(name=subject.name, plan=None, errors=subject.faults, warnings=())
            if subject.config is None or subject.faults
            else next(checks)
            for subject in subjects
        )
    )


def valid_plans(checks: Sequence[SubjectCheck], *, skip_invalid: bool) -> tuple[Plan, ...]:
    """The plans; InputError when a subject has errors, unless those are to be passed over and one is left."""
    invalid = [check for check in checks if check.errors]
    plans = tuple(check.plan for check in checks if check.plan is not None)
    if invalid and not skip_invalid:
        shown = ", ".join(check.name for check in invalid[:5])
        raise InputError(
            f"{len(invalid)} of {len(checks)} subjects can't be trained ({shown}{', …' if len(invalid) > 5 else ''}); "
            f"put them right, or go on without them with --skip-invalid"
        )
    if not plans:
        raise InputError(f"none of the {len(checks)} subjects can be trained, so there is nothing to do")
    return plans


def _with_identifiers(configs: Sequence[DreamBoothConfig]) -> list[DreamBoothConfig]:
    """Choose for all subjects of a base model together, so that no two share one."""
    chosen: dict[str, str] = {}
    bases = dict.fromkeys((config.base_model, config.revision) for config in configs)
    for base_model, revision in bases:
        subjects = [
            config.subject for config in configs if (config.base_model, config.revision) == (base_model, revision)
        ]
        taken = [str(subject.identifier) for subject in subjects if subject.identifier is not None]
        names = [subject.name for subject in subjects if subject.identifier is None]
        if names:
            tokenizer = load_tokenizer(resolve_base_model(base_model, revision).directory)
            chosen |= choose_identifiers(tokenizer, tuple(names), taken=(*taken, *chosen.values()))
    return [
        config.model_copy(
            update={"subject": config.subject.model_copy(update={"identifier": chosen[config.subject.name]})}
        )
        if config.subject.name in chosen
        else config
        for config in configs
    ]


def _check(config: DreamBoothConfig, resources: Resources) -> SubjectCheck:
    name = config.subject.name
    try:
        plan = make_plan(config, resources)
    except InputError as error:
        return SubjectCheck(name=name, plan=None, errors=tuple(str(error).splitlines()), warnings=())
    warnings = (*plan.warnings, *_about_images(plan), *_about_class_noun(plan))
    return SubjectCheck(name=name, plan=plan, errors=(), warnings=warnings)


def _about_images(plan: Plan) -> Iterator[str]:
    names = [image.address.rsplit("/", 1)[-1] for image in plan.images]
    opened = [open_image(image.address, max_pixels=plan.config.images.max_pixels) for image in plan.images]
    contents = [hashlib.sha256(image.tobytes()).digest() for image in opened]
    hashes = [_difference_hash(image) for image in opened]
    for one, other in combinations(range(len(names)), 2):
        if contents[one] == contents[other]:
            yield f"{names[one]} and {names[other]} are the same picture"
        elif int(np.count_nonzero(hashes[one] != hashes[other])) <= _NEAR_BITS:
            yield f"{names[one]} and {names[other]} are nearly the same picture"
    sizes = sorted({image.size for image in opened})
    if len(sizes) > 1:
        yield f"images of {len(sizes)} sizes, from {sizes[0][0]}x{sizes[0][1]} to {sizes[-1][0]}x{sizes[-1][1]}"


def _difference_hash(image: Image.Image) -> np.ndarray:
    """Whether each of 8 x 8 cells is brighter than its right neighbour: 64 bits."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR), dtype=np.int16)
    bits: np.ndarray = grey[:, :-1] > grey[:, 1:]
    return bits


def _about_class_noun(plan: Plan) -> Iterator[str]:
    tokenizer, noun = load_tokenizer(plan.base.directory), plan.config.subject.class_noun
    tokens = token_ids_in_prompts(tokenizer, noun)
    if len(tokens) > len(noun.split()):
        parts = " ".join(repr(str(tokenizer.decode([token])).strip()) for token in tokens)
        yield f"the base model has no word of its own for the class noun {noun!r}, and reads it as {parts}"


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
            warnings = (*check.warnings, f"its images are those of {other}")
            yield SubjectCheck(name=check.name, plan=check.plan, errors=(), warnings=warnings)
