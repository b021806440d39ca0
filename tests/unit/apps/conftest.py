"""A study of two models."""

from pathlib import Path

import pytest
from study_samples import A, B

from pipelines.apps.study.store import StudyFile
from pipelines.apps.study.study import make_questions


@pytest.fixture
def study(tmp_path: Path) -> StudyFile:
    return StudyFile.create(
        tmp_path / "study.sqlite", make_questions(A, B, count=6, seed=0), {"a": "A", "b": "B", "seed": 0}
    )
