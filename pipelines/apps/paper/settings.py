"""The two sizes of `dreambooth paper`: all experiments on all shipped subjects, or the paper's findings on two."""

from collections.abc import Sequence
from dataclasses import replace

from dreambooth.errors import InputError
from dreambooth.miniature import subject_names
from pipelines.apps.paper.experiments import EXPERIMENTS, SUPER_RESOLUTION, TABLE_1, TABLE_3, TABLE_4, TABLE_5
from pipelines.apps.paper.rows import Setting

FEW_SUBJECTS = ("coral-car", "navy-dog", "violet-teapot")
"""Subjects of side experiments. They aren't green, the common word used as an identifier there."""


def full_setting() -> Setting:
    """All tables, with two samples per prompt for DIV."""
    return Setting(
        name="full",
        experiments=EXPERIMENTS,
        subjects=subject_names(),
        few_subjects=FEW_SUBJECTS,
        images_per_prompt=2,
        # Class images are shared by many runs, so more pay off than for one subject.
        common={"miniature": {"train.max_train_steps": 250, "prior.num_class_images": 200}},
    )


def quick_setting() -> Setting:
    """The paper's tables, and the two ends of Table 5, on an object and an animal that need few steps."""
    ends = replace(TABLE_5, rows=(TABLE_5.rows[0], TABLE_5.rows[-1]))
    subjects = ("coral-car", "magenta-cat")
    return Setting(
        name="quick",
        experiments=(TABLE_1, TABLE_3, TABLE_4, ends, SUPER_RESOLUTION),
        subjects=subjects,
        few_subjects=subjects,
        common={"miniature": {"train.max_train_steps": 200, "prior.num_class_images": 50}},
    )


def with_tables(setting: Setting, names: Sequence[str]) -> Setting:
    """A setting with some of its tables only, or all for no names. Raises InputError for names of none of them."""
    known = [experiment.name for experiment in setting.experiments]
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--table {unknown[0]}: the {setting.name} setting has the tables {', '.join(known)}")
    return replace(setting, tables=tuple(names))
