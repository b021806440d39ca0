"""Contact sheets of `dreambooth paper`: real images above each row's samples of the same prompts."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dreambooth.miniature import subject_dir
from pipelines.apps.paper.rows import Experiment
from pipelines.apps.paper.trials import Trial
from pipelines.report.pictures import Row, contact_sheet
from pipelines.storage.files import read_bytes

_SUBJECTS, _PROMPTS = 3, 8


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A contact sheet, and the prompts of its columns, without identifier, for the first subject."""

    image: Image.Image
    prompts: tuple[str, ...]


def contact_sheets(trials: Sequence[Trial], evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Sheet]:
    """Sheets of the first subjects, by experiment; experiments without samples have none."""
    sheets = {}
    for experiment in {trial.experiment.name: trial.experiment for trial in trials}.values():
        of_experiment = [trial for trial in trials if trial.experiment.name == experiment.name]
        sampled = [evaluations[trial.plan.key] for trial in of_experiment if trial.plan.key in evaluations]
        if sampled:
            prompts = tuple(picture["base_prompt"] for picture in _spread(sampled[0]["pictures"]))
            image = contact_sheet(_rows(experiment, of_experiment, evaluations))
            sheets[experiment.name] = Sheet(image=image, prompts=prompts)
    return sheets


def _rows(experiment: Experiment, trials: Sequence[Trial], evaluations: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    rows: list[Row] = []
    for subject in dict.fromkeys(trial.subject for trial in trials):
        of_subject = {trial.row.slug: trial for trial in trials if trial.subject == subject}
        sampled = [
            (row.title, evaluations[of_subject[row.slug].plan.key])
            for row in experiment.rows
            if not row.reads and of_subject[row.slug].plan.key in evaluations
        ]
        if sampled and len(rows) < _SUBJECTS * (len(experiment.rows) + 1):
            rows.append(Row(title=f"{subject}: real images", images=_real(subject)))
            rows += [Row(title=f"{subject}: {title}", images=_samples(evaluation)) for title, evaluation in sampled]
    return rows


def _real(subject: str) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(subject_dir(subject).glob("*.png"))]


def _samples(evaluation: Mapping[str, Any]) -> list[Image.Image]:
    """First samples of some prompts."""
    return [
        Image.open(io.BytesIO(read_bytes(picture["fine_tuned"][0]))).convert("RGB")
        for picture in _spread(evaluation["pictures"])
    ]


def _spread(pictures: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A few prompts spread over the list."""
    count = min(_PROMPTS, len(pictures))
    return [pictures[place * len(pictures) // count] for place in range(count)]
