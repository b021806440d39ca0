"""Turn experiments into runs of a batch: every row for every subject, equal settings once."""

import functools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import yaml

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.identifier import choose_identifiers
from dreambooth.miniature import subject_dir, subject_names
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.families import load_tokenizer
from pipelines.apps.paper.experiments import WRONG_NOUNS
from pipelines.apps.paper.rows import Experiment, Row, Setting
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.run_plan import Plan, make_plan
from pipelines.storage.files import join

_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One row for one subject. Trials with equal settings share the `plan` of the first."""

    experiment: Experiment
    row: Row
    subject: str
    plan: Plan


def plan_trials(setting: Setting, output: str, overrides: Sequence[str], resources: Resources) -> tuple[Trial, ...]:
    """Every row of a setting for each of its subjects, in training order.

    Raises InputError for impossible overrides.
    """
    wanted = list(_wanted(setting))
    configs = [
        trial_config(setting, experiment, row, subject, output, overrides) for experiment, row, subject in wanted
    ]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        plans = list(pool.map(functools.partial(make_plan, resources=resources), configs))
    first: dict[str, Plan] = {}
    return tuple(
        Trial(experiment=experiment, row=row, subject=subject, plan=first.setdefault(plan.key, plan))
        for (experiment, row, subject), plan in zip(wanted, plans, strict=True)
    )


def distinct_plans(trials: Sequence[Trial]) -> tuple[Plan, ...]:
    """The distinct runs of trials."""
    return tuple({trial.plan.key: trial.plan for trial in trials}.values())


def trial_config(
    setting: Setting, experiment: Experiment, row: Row, subject: str, output: str, overrides: Sequence[str] = ()
) -> DreamBoothConfig:
    """The configuration of one run; `overrides` (a.b=value) take precedence."""
    noun = _noun(subject)
    photographs = [str(path) for path in sorted(subject_dir(subject).glob("*.png"))]
    plain: dict[str, Any] = {
        "base_model": row.base_model,
        "subject": {
            "name": f"{experiment.name}-{row.slug}-{subject}",
            "class_noun": WRONG_NOUNS[noun] if row.class_noun == "wrong" else noun,
            "identifier": _identifiers()[subject],
            "instance_images": photographs[: row.instance_images],
        },
        "train": {"log_every": 10},
        "storage": {"root": output},
        "tracking": {
            "uri": f"sqlite:///{join(output, 'mlflow.db')}",
            "experiment": "paper",
            "register_model": False,
        },
        "evaluation": {
            "enabled": False,
            "protocol": "miniature",
            "images_per_prompt": setting.images_per_prompt,
            "real_images": photographs,
        },
    }
    settings = {**setting.common.get(row.base_model, {}), **row.settings}
    return load_config(plain, (*(f"{name}={json.dumps(value)}" for name, value in settings.items()), *overrides))


def _wanted(setting: Setting) -> Iterator[tuple[Experiment, Row, str]]:
    """Rows by subject; rows come after those whose runs they reuse."""
    for experiment in setting.experiments:
        for row in sorted(experiment.rows, key=lambda row: bool(row.reads)):
            for subject in setting.subjects_of(experiment):
                yield experiment, row, subject


@functools.cache
def _identifiers() -> dict[str, str]:
    """The identifier of each subject, the same in all its runs: a token of its own to every built-in base model."""
    tokenizer = load_tokenizer(resolve_base_model("miniature").directory)
    return choose_identifiers(tokenizer, subject_names())


def _noun(subject: str) -> str:
    noun: str = yaml.safe_load((subject_dir(subject) / "subject.yaml").read_text())["class_noun"]
    return noun
