"""The page of `dreambooth paper` in a browser, of made-up figures for all its tables."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from chromium import needs_browser, open_browser
from PIL import Image

from dreambooth.evaluation.bootstrap import bootstrap_mean
from dreambooth.evaluation.figures import BankId, Figure, Figures
from pipelines.apps.paper.experiments import EXPERIMENTS
from pipelines.apps.paper.page import render_page
from pipelines.apps.paper.sheets import Sheet
from pipelines.apps.paper.tables import make_tables
from pipelines.apps.paper.trials import Trial

pytestmark = needs_browser

BANK = BankId(name="miniature", hash="0123456789abcdef")
VALUES = {
    **{"dino": [0.5, 0.6], "clip_i": [0.7, 0.8], "clip_t": [0.6, 0.7], "clip_t_no_identifier": [0.6, 0.7]},
    **{"pres": [0.1, 0.2], "div": [0.2, 0.3], "near_copies": [0.0, 0.1]},
    **{"real_dino": [0.9, 0.95, 0.9], "real_clip_i": [0.8, 0.85, 0.9]},
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of two subjects, with a sheet of samples below each table."""
    figures = {
        name: Figure(bank=BANK, interval=bootstrap_mean([values]), values=tuple(values))
        for name, values in VALUES.items()
    }
    measured = Figures(bank=BANK, figures=figures, per_prompt=(), nearest=(), warnings=(), unmeasured={}).as_dict()
    trials = [
        Trial(
            experiment=experiment,
            row=row,
            subject=subject,
            plan=cast("Any", SimpleNamespace(key=f"{experiment.name}-{row.slug}-{subject}")),
        )
        for experiment in EXPERIMENTS
        for row in experiment.rows
        for subject in ("coral-car", "magenta-cat")
    ]
    tables, _ = make_tables(trials, {trial.plan.key: measured for trial in trials})
    sheet = Sheet(image=Image.new("RGB", (780, 320), "teal"), prompts=("a photo of [V] car on the beach",))
    facts = [("setting", "quick: 2 subjects"), ("base model", "miniature, hash 0123456789abcdef")]
    page = tmp_path_factory.mktemp("paper") / "index.html"
    page.write_text(render_page(tables, facts, {table.experiment.name: sheet for table in tables}))
    return page.as_uri()


@pytest.mark.parametrize("width", [390, 1920])
def test_it_has_no_faults_for_eyes_and_readers(address: str, tmp_path: Path, width: int) -> None:
    with open_browser(tmp_path / "profile", width=width) as page:
        page.open(address)
        assert page.faults() == []
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        page.run("document.images[0].scrollIntoView()")
        page.until("document.images[0].naturalWidth")
        assert page.console() == []
