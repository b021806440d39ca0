"""The pages of a run and of a batch in a real browser: they sort, show the base model's pictures, and fit a phone."""

import io
from pathlib import Path

import pytest
from chromium import Browser, needs_browser, open_browser
from PIL import Image

from dreambooth.evaluation.bootstrap import Interval
from dreambooth.evaluation.figures import BankId, Figure, Figures, NearestInstance, PromptRow
from pipelines.report.batch_report import render_report
from pipelines.report.batch_result import BatchResult, SubjectResult
from pipelines.report.evaluated import Evaluated, PromptPictures
from pipelines.report.run_report import render_run
from pipelines.tasks import SubjectRecord

pytestmark = needs_browser

NAMES = "[...document.querySelectorAll('tbody')[0].rows].map(row => row.cells[0].textContent[0]).join('')"
LONG = "s3://a-bucket/with/a/very/long/address/that/has/no/place/to/be/broken/in/at/all"
SIMILARITIES = {"b-long-name-of-a-subject-that-is-as-long-as-allowed": 0.0, "c": -0.2, "a": 0.9, "d": None}
HISTORY = [{"step": i, "loss": 0.1, "instance_loss": 0.1, "prior_loss": 0.1} for i in range(9)]


@pytest.fixture
def evaluated(tmp_path: Path) -> Evaluated:
    bank = BankId(name="miniature", hash="0123456789abcdef")
    interval = Interval(mean=0.7, low=0.6, high=0.8, n=25)
    prompts = [f"a photo of sks dog in place {place}" for place in range(25)]
    addresses = []
    for place in range(51):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (5 * place, 80, 0)).save(buffer, "PNG")
        (tmp_path / f"{place}.png").write_bytes(buffer.getvalue())
        addresses.append(str(tmp_path / f"{place}.png"))
    row = {"application": "recontextualization", "clip_i": 0.8, "clip_t": 0.31, "clip_t_no_identifier": 0.3}
    more = {"clip_t_base": 0.33, "followed": True, "div": 0.1, "background_leak": None, "near_copies": 0.0}
    return Evaluated(
        subject="rex",
        class_noun="dog",
        identifier="sks",
        instance=(addresses[50],) * 5,
        prompts=tuple(
            PromptPictures(prompt=prompt, fine_tuned=(addresses[place],), base=(addresses[25 + place],))
            for place, prompt in enumerate(prompts)
        ),
        figures=Figures(
            bank=bank,
            figures={name: Figure(bank=bank, interval=interval, values=(0.7,) * 25) for name in ("dino", "clip_t")},
            per_prompt=tuple(
                PromptRow(prompt=prompt, dino=place / 25, **row, **more)  # type: ignore[arg-type]
                for place, prompt in enumerate(prompts)
            ),
            nearest=tuple(
                NearestInstance(sample=place, prompt=prompt, instance=place % 5, similarity=0.5, near_copy=False)
                for place, prompt in enumerate(prompts)
            ),
            warnings=("samples copy the photographs: fewer steps or more class images",),
            unmeasured={},
        ),
    )


def batch_page(evaluated: Evaluated) -> str:
    subjects = [
        SubjectResult(
            record=SubjectRecord(name=name, key="k", class_noun="dog", identifier="sks", state="done"),
            similarity=None if similarity is None else {"identifier": similarity},
            history=HISTORY,
            evaluated=evaluated,
        )
        for name, similarity in SIMILARITIES.items()
    ]
    return render_report(BatchResult(name="pets", facts=[("writes to", LONG)], subjects=subjects))


def run_page(evaluated: Evaluated) -> str:
    summary = {"subject": "rex", "class_noun": "dog", "identifier": "sks"}
    return render_run(summary, [("model", LONG)], HISTORY, evaluated)


def sort_by(page: Browser, title: str) -> str:
    page.run(f"[...document.querySelectorAll('th')].find(head => head.textContent === '{title}').click()")
    names: str = page.run(f"return {NAMES}")
    return names


def test_they_sort_and_point_at_the_base_model(evaluated: Evaluated, tmp_path: Path) -> None:
    (tmp_path / "batch.html").write_text(batch_page(evaluated))
    (tmp_path / "run.html").write_text(run_page(evaluated))
    opacity = "return getComputedStyle(document.querySelector('.pair .base')).opacity"
    with open_browser(tmp_path / "profile") as page:
        page.open((tmp_path / "batch.html").as_uri())
        assert page.run(f"return {NAMES}") == "bcad"
        assert sort_by(page, "similarity") == "dcba"  # what was not measured is below all that was
        assert sort_by(page, "similarity") == "abcd"
        assert sort_by(page, "subject") == "abcd"
        for name in ("batch", "run"):
            page.open((tmp_path / f"{name}.html").as_uri())
            assert page.run("return document.querySelectorAll('.pair').length") == (100 if name == "batch" else 25)
            assert page.run(opacity) == "0"
            page.run("document.querySelector('.pair').scrollIntoView({block: 'center'})")
            page.hover(".pair")
            assert page.run(opacity) == "1"
            page.hover("h1")
            assert page.run(opacity) == "0"
            page.run("document.querySelector('.pair').focus()")
            assert page.run(opacity) == "1"
            assert page.run("return [...document.images].every(image => image.src.startsWith('data:'))")
        assert page.console() == []


def test_they_fit_a_phone_with_the_base_model_beside(evaluated: Evaluated, tmp_path: Path) -> None:
    with open_browser(tmp_path / "profile", width=390, height=844) as page:
        for html in (batch_page(evaluated), run_page(evaluated)):
            (tmp_path / "page.html").write_text(html)
            page.open((tmp_path / "page.html").as_uri())
            assert page.run("return innerWidth") == 390
            assert page.run("return document.documentElement.scrollWidth") == 390
            tuned, base = page.run(
                "return [...document.querySelector('.pair').children].map(each => each.getBoundingClientRect().left)"
            )
            assert base > tuned
        assert page.console() == []
